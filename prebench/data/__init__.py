"""Training and test data: generated scenes, easy-VQA, examples, batches, the local mirror."""

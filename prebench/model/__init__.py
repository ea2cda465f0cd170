"""The model: builder, tokenizer, freezing, and the definition of visual states."""

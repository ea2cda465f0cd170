"""prebench: an evaluation-integrated benchmark harness for Predictive Regularization (arXiv 2603.20808)."""

__version__ = "0.1.0"

"""prebench: an evaluation-integrated benchmark harness for Predictive Regularization (arXiv 2603.20808)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prebench.train.drop_in import PredictiveRegularizer
    from prebench.train.trainer_mixin import PredictiveTrainerMixin

__version__ = "0.1.0"
__all__ = ["PredictiveRegularizer", "PredictiveTrainerMixin", "__version__"]


def __getattr__(name: str) -> Any:
    """Return what an own trainer needs; loaded when it is asked for, as the command line must not wait for torch."""
    if name == "PredictiveRegularizer":
        from prebench.train.drop_in import PredictiveRegularizer

        return PredictiveRegularizer
    if name == "PredictiveTrainerMixin":
        from prebench.train.trainer_mixin import PredictiveTrainerMixin

        return PredictiveTrainerMixin
    raise AttributeError(f"module 'prebench' has no attribute {name!r}")

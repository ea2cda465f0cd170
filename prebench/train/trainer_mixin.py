"""PRe in transformers' Trainer and in what derives from it, TRL's SFTTrainer first of all.

    class Trainer(PredictiveTrainerMixin, SFTTrainer): pass
    trainer = Trainer(model=model, regularizer=PredictiveRegularizer(model, weight=0.5), ...)

The loss is prebench's own: sums over images are divided by the images of the whole optimizer step, over accumulation
steps and processes, as the trainer divides its own by target tokens. The trainer's checkpoints hold the predictor and
its optimizer in a file of their own; `save_model` knows nothing of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from prebench.errors import ConfigError, StoreError
from prebench.store import write_bytes
from prebench.train.drop_in import PredictiveRegularizer

PREDICTOR_FILE = "prebench_predictor.safetensors"

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the class that the user names behind the mixin


class PredictiveTrainerMixin(_Trainer):
    """Stands before a Trainer among a class's bases; adds `lm_loss`, `pre_loss` and `predictor_grad_norm` to its logs.

    Args:
        args: of the trainer.
        regularizer: PRe on the trainer's model.
        kwargs: of the trainer.

    Raises:
        ConfigError: the trainer is to use float16 or nn.DataParallel.
    """

    def __init__(self, *args: Any, regularizer: PredictiveRegularizer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            raise ConfigError("PredictiveTrainerMixin: fp16 scales gradients, the predictor's are not; take bf16")
        if self.args.n_gpu > 1:
            raise ConfigError(
                "PredictiveTrainerMixin: nn.DataParallel is not supported; start the script with torchrun"
            )
        self.regularizer = regularizer
        self._images_per_process: float = 0.0
        self._losses: dict[str, Any] = {}
        self._steps_logged = 0
        self.add_callback(_Predictor(self))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint on where one is named; its predictor goes on, too.

        Raises:
            StoreError: the checkpoint has no predictor.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            path = Path(folder) / PREDICTOR_FILE
            if not path.is_file():
                raise StoreError(f"{path}: missing: this checkpoint was made without PredictiveTrainerMixin")
            self.regularizer.load_state_dict(load_file(path))
            _restore_weights(self.model, Path(folder))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the micro-batches of an optimizer step, and count their images."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = torch.tensor(sum(self.regularizer.count_images(batch) for batch in batches), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            self._images_per_process = self.accelerator.gather(images).sum().item() / self.accelerator.num_processes
        else:
            self._images_per_process = images.item()
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's own loss plus, in training, weight * L_PRe."""
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not self.model.training:
            return result
        lm_loss, *outputs = result if return_outputs else (result,)
        # Without a count of tokens the trainer takes the mean of its micro-batches' means; then PRe does, too.
        whole_step = num_items_in_batch is not None
        loss = lm_loss + self.regularizer.loss(self._images_per_process if whole_step else None)
        share = 1.0 if whole_step else 1.0 / self.current_gradient_accumulation_steps
        assert self.regularizer.pre_loss is not None
        for name, value in (("lm_loss", lm_loss.detach()), ("pre_loss", self.regularizer.pre_loss)):
            self._losses[name] = self._losses.get(name, 0.0) + share * value
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means over the steps since the last time beside what the trainer logs."""
        steps = self.state.global_step - self._steps_logged
        if "loss" in logs and self._losses and steps:
            for name, value in self._losses.items():
                logs[name] = self.accelerator.gather(value.reshape(1)).mean().item() / steps
            logs["predictor_grad_norm"] = self._predictor_norm
            self._losses, self._steps_logged = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

    def _step_predictor(self) -> None:
        self._predictor_norm = self.regularizer.step()

    def _save_predictor(self, folder: Path) -> None:
        write_bytes(folder / PREDICTOR_FILE, save(self.regularizer.state_dict()))


def _restore_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint's weights into the model.

    Saved under their published names, many multimodal models' weights are not found by transformers' trainer (5.23),
    which then goes on with those of the model's start and a warning (huggingface/transformers issue 43701).
    """
    published = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if not published or hasattr(model, "peft_config"):
        return  # adapters and sharded checkpoints keep the names of the model
    saved = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


class _Predictor(TrainerCallback):
    """Lets the predictor make its step when the model does, and puts it into checkpoints."""

    def __init__(self, trainer: PredictiveTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting where a checkpoint ended."""
        self._trainer._losses, self._trainer._steps_logged = {}, state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the predictor's step."""
        self._trainer._step_predictor()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the predictor to the checkpoint that was written."""
        if args.should_save:
            self._trainer._save_predictor(Path(args.output_dir) / f"checkpoint-{state.global_step}")

"""A suite: what is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prebench.schema.base import Name, StrictModel, require_distinct


class TaskConfig(StrictModel):
    """One column of the tables: an lmms-eval task and how prebench reads it."""

    task: str
    """lmms-eval's task id."""
    label: str
    """Column title; names generated data as such."""
    data_source: Literal["generated", "real"]
    primary_metric: str
    """The metric of the task's own aggregation that the tables show."""
    num_images: int | None = Field(None, gt=0)
    """Images in the embedded mirror (easy-VQA: of the real test split, at most 1000); null: the whole benchmark, which
    a mirror folder of the user's holds."""
    questions_per_image: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _generated_data_has_a_size(self) -> TaskConfig:
        if self.num_images is None and self.data_source == "generated":
            raise ValueError(f"task {self.task!r}: num_images is missing; only real data may leave it out")
        return self


class AttributeConfig(StrictModel):
    """One attribute that the linear probes decode."""

    name: str
    kind: Literal["asked", "unasked", "rare"]
    """Mentioned in questions; in no text at all; in 2% of the questions."""


class ProbeConfig(StrictModel):
    """The internal visual probe: an lmms-eval task of ours."""

    task: str = "prebench_visual_probe"
    num_train: int = Field(gt=0)
    num_val: int = Field(gt=0)
    num_test: int = Field(gt=0)
    attributes: tuple[AttributeConfig, ...]
    reference_attribute: str
    """The attribute on which degradation is defined; fixed before a run."""

    @model_validator(mode="after")
    def _reference_is_known(self) -> ProbeConfig:
        names = [attribute.name for attribute in self.attributes]
        if self.reference_attribute not in names:
            raise ValueError(f"reference_attribute {self.reference_attribute!r} is none of {', '.join(names)}")
        return self


class SuiteDefaults(StrictModel):
    """What `prebench run --suite S` takes where the command line is silent."""

    preset: str
    variants: tuple[str, ...] = ("baseline", "pre")
    seeds: tuple[int, ...] = (0,)


class SuiteConfig(StrictModel):
    """What is measured."""

    name: Name
    description: str = ""
    defaults: SuiteDefaults
    mirror_seed: int = Field(0, ge=0)
    tasks: tuple[TaskConfig, ...]
    probe: ProbeConfig | None = None
    max_error_share: float = Field(0.01, ge=0, le=1)
    """A task with a larger share of failed documents is no result."""

    @model_validator(mode="after")
    def _distinct_tasks(self) -> SuiteConfig:
        require_distinct("task", self.task_names)
        return self

    @property
    def task_names(self) -> list[str]:
        """Return the lmms-eval ids, the probe last."""
        return [t.task for t in self.tasks] + ([self.probe.task] if self.probe else [])

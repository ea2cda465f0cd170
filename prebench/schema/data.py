"""What a model is trained on: generated data, or conversations in published formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from prebench.schema.base import StrictModel


class ScenesConfig(StrictModel):
    """Generated scenes for training (prebench.data.scenes)."""

    num_images: int = Field(gt=0)
    questions_per_image: int = Field(gt=0)
    """Turns in one conversation."""
    min_objects: int = Field(2, ge=1)
    max_objects: int = Field(5, ge=1, le=9)

    @model_validator(mode="after")
    def _ordered(self) -> ScenesConfig:
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is larger than max_objects {self.max_objects}")
        return self


class EasyVqaConfig(StrictModel):
    """The training split of easy-VQA (real, from its PyPI package)."""

    num_images: int = Field(3600, gt=0, le=3600)
    """The split's last 400 pictures are held out as validation."""
    questions_per_image: int = Field(6, gt=0)


class LlavaJsonConfig(StrictModel):
    """LLaVA's JSON (a list of records, or one record per line) and its image folders."""

    type: Literal["llava_json"]
    path: str = Field(min_length=1)
    """The JSON file; relative to the working directory, as every path of a preset."""
    image_root: str | dict[str, str] | None = None
    """The folder of the images, or a folder for each first part of their paths (`coco: /data/coco`); the JSON file's
    folder by default."""
    prompt: Literal["chat", "plain"] = "chat"
    """`plain`: image, caption and a line break alone, LLaVA's rule for its align stage."""

    def __hash__(self) -> int:
        """Return a hash: pydantic makes none of a mapping."""
        return hash(self.model_dump_json())


class ColumnsConfig(StrictModel):
    """Which columns of a table hold what."""

    images: str = "images"
    """A picture or a list of pictures per row; may be missing where all rows are text."""
    texts: str = "texts"
    """Of `type: cauldron`: a list of {user, assistant}."""
    messages: str = "messages"
    """Of `type: messages`: a list of {role, content}."""


class TableConfig(StrictModel):
    """A Parquet table, local or on the Hub: `cauldron` (The Cauldron, FineVision) or `messages` (what TRL reads)."""

    type: Literal["cauldron", "messages"]
    path: str = Field(min_length=1)
    """A Parquet file, a folder of them, or a data set's id on the Hub."""
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")
    """The commit to read; a data set on the Hub needs one."""
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    """Read the first `num_examples` rows alone, without fetching the rest."""
    num_examples: int | None = Field(None, gt=0)
    """The first so many rows; all by default."""
    columns: ColumnsConfig = ColumnsConfig()
    prompt: Literal["chat", "plain"] = "chat"

    @model_validator(mode="after")
    def _bounded(self) -> TableConfig:
        if self.streaming and self.num_examples is None:
            raise ValueError("streaming needs num_examples: how many rows to read")
        return self


SourceConfig = Annotated[LlavaJsonConfig | TableConfig, Field(discriminator="type")]


class DataConfig(StrictModel):
    """What a model is trained on: scenes and easy-VQA, or conversations from files, a list of sources per stage."""

    seed: int = Field(0, ge=0)
    """Seed of the generated training data: the same for all runs of a study."""
    scenes: ScenesConfig | None = None
    easy_vqa: EasyVqaConfig | None = None
    suffix_share: float = Field(0.5, ge=0, le=1)
    """Share of the questions that carry the benchmarks' answer-format suffix."""
    align: tuple[SourceConfig, ...] = ()
    instruct: tuple[SourceConfig, ...] = ()
    pad_to_square: bool = False
    """Pad pictures to squares with the mean colour, as LLaVA does; the exported processor does the same."""
    max_length: int | None = Field(None, gt=1)
    """Tokens of an example, visual tokens included; the rest is cut off at the end, never within a picture."""
    group_by: Literal["none", "length", "modality_length"] = "none"
    """Batches of examples of like length; `modality_length`: and with pictures or without."""
    check_images: Literal["decode", "header"] = "decode"
    """How pictures are checked before training: `header` is far quicker and finds no truncated files."""
    max_bad_share: float = Field(0.001, ge=0, lt=1)
    """Share of a source's examples that may be left out for bad pictures or records before that is an error."""
    num_workers: int = Field(0, ge=0)
    """Processes that load batches ahead; the order stays."""

    @property
    def from_files(self) -> bool:
        """Tell whether the examples come from files."""
        return bool(self.align or self.instruct)

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        generated = self.scenes is not None or self.easy_vqa is not None
        if generated == self.from_files:
            raise ValueError("name at least one source: scenes or easy_vqa, or else files for align and instruct")
        for name in ("max_length", "group_by"):
            if generated and getattr(self, name) != DataConfig.model_fields[name].default:
                raise ValueError(f"{name} is for sources of files (align, instruct)")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not chosen, so that generated data keep the hash that they had without these fields."""
        values: dict[str, Any] = handler(self)
        fields = DataConfig.model_fields
        later = list(fields)[list(fields).index("align") :]
        return {k: v for k, v in values.items() if k not in later or getattr(self, k) != fields[k].default}

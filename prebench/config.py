"""Strict YAML to frozen models: names and paths, `extends`, `--set`, readable errors, and the diff of two configs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from prebench.errors import ConfigError, did_you_mean
from prebench.runtime import data_dir
from prebench.schema import PresetConfig, RegularizerConfig, StrictModel, SuiteConfig, VariantConfig, config_class

ModelT = TypeVar("ModelT", bound=StrictModel)

KINDS: dict[str, type[StrictModel]] = {
    "presets": PresetConfig,
    "suites": SuiteConfig,
    "variants": VariantConfig,
}


def list_configs(kind: str) -> list[str]:
    """Return the names of the shipped `presets`, `suites` or `variants`."""
    return sorted(path.stem for path in (data_dir("configs") / kind).glob("*.yaml"))


def load_preset(name_or_path: str, overrides: Sequence[str] = ()) -> PresetConfig:
    """Load a preset by name or by the path of a YAML file, then apply `a.b=c` overrides."""
    return _load(PresetConfig, "presets", name_or_path, overrides)


def load_suite(name_or_path: str) -> SuiteConfig:
    """Load a suite by name or path."""
    return _load(SuiteConfig, "suites", name_or_path)


def load_variant(name_or_path: str) -> VariantConfig:
    """Load a variant by name or path."""
    return _load(VariantConfig, "variants", name_or_path)


def _load(model: type[ModelT], kind: str, name_or_path: str, overrides: Sequence[str] = ()) -> ModelT:
    path = _find(kind, name_or_path)
    values = _read_with_extends(path, kind)
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(values, override, model)
    where = str(path) + (" with --set" if overrides else "")
    return validate(model, values, where)


def _find(kind: str, name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        return path
    known = list_configs(kind)
    if name_or_path not in known:
        raise ConfigError(f"unknown {kind[:-1]} {name_or_path!r}{did_you_mean(name_or_path, known)}")
    return data_dir("configs") / kind / f"{name_or_path}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is no readable YAML mapping; line and column are named.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: malformed YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: a mapping of names to values is expected at the top level")
    return values


def _read_with_extends(path: Path, kind: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    chain = (*extended_by, path.resolve())
    base_path = _find(kind, str(base))
    if base_path.resolve() in chain:
        raise ConfigError(f"{path}: extends {base!r}, which leads back to a file that extends it")
    base_values = _read_with_extends(base_path, kind, chain)
    base_values.pop("name", None)
    return _merge(base_values, values)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str, model: type[StrictModel]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is no YAML ({error})") from error
    target = values
    *sections, field = key.split(".")
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
    target[field] = value


def validate(model: type[ModelT], values: Mapping[str, Any], where: str) -> ModelT:
    """Build a config model; every problem becomes part of one ConfigError line that names file and field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_describe(model, values, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from error


def _describe(model: type[StrictModel], values: Any, problem: Mapping[str, Any]) -> str:
    location = list(map(str, problem["loc"]))
    field = ".".join(location) or "top level"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, values, problem["loc"][:-1])
        return f"unknown key {field!r}{did_you_mean(location[-1], known)}"
    if problem["type"] == "missing":
        return f"the key {field!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{field}: {message} (got {problem['input']!r})" if location else message


def _fields_at(model: type[StrictModel], values: Any, location: Sequence[str | int]) -> list[str]:
    current: type[BaseModel] = model
    for part in location:
        with contextlib.suppress(LookupError, TypeError):  # a union's tag is no key
            values = values[part]
        if isinstance(part, int):
            continue
        nested = _nested_model(current, part)
        if nested is None:
            return []
        current = nested
        if issubclass(current, RegularizerConfig):
            current = config_class(values.get("type", "predictive"))
    return list(current.model_fields)


def _nested_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    info = model.model_fields.get(field)
    pending: list[Any] = [info.annotation] if info else []
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        pending.extend(getattr(candidate, "__args__", ()))
    return None


def dump_yaml(model: StrictModel) -> str:
    """Return a config as YAML text that `validate` reads back to an equal config."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def diff(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield one line per leaf that differs: `train.instruct.steps: 700 -> 800`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from diff(old.get(key, "(absent)"), new.get(key, "(absent)"), path)
    elif old != new:
        yield f"{prefix}: {old} -> {new}"

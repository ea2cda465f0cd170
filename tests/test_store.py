"""Files: atomic, faithful, one clear error per bad file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prebench.errors import StoreError
from prebench.records import SampleRecord, TaskRecord, content_hash, from_dict, to_dict
from prebench.store import read_json, read_jsonl, read_record, write_json, write_jsonl, write_record

SAMPLE = SampleRecord(0, "img", "p", "i", "is there a cat?", "yes", "no", 0.0)


def test_records_round_trip(tmp_path):
    failed = SampleRecord(1, "img", "p", "i", "q", "yes", None, None, error="corrupt image")
    write_jsonl(tmp_path / "s.jsonl", [SAMPLE, failed])
    assert [from_dict(SampleRecord, line) for line in read_jsonl(tmp_path / "s.jsonl")] == [SAMPLE, failed]
    record = TaskRecord("gqa", "GQA", "pre", 0, "exact_match", 0.5, {"exact_match": 0.5}, 2, 0, "generated")
    write_record(tmp_path / "t.json", record)
    assert read_record(tmp_path / "t.json", TaskRecord) == record


def test_a_missing_field_is_named(tmp_path):
    write_json(tmp_path / "t.json", {"task": "gqa"})
    with pytest.raises(StoreError, match="'label' is missing"):
        read_record(tmp_path / "t.json", TaskRecord)


def test_unknown_fields_of_newer_versions_are_ignored():
    assert from_dict(SampleRecord, to_dict(SAMPLE) | {"new": 1}) == SAMPLE


def test_bad_files_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StoreError, match=r"bad\.json: can't be read as JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(StoreError, match="not found"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(StoreError, match=r"bad\.jsonl:2: no JSON"):
        list(read_jsonl(tmp_path / "bad.jsonl"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="can't be written"):
        write_json(tmp_path / "file" / "t.json", 1)
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", object())
    assert (tmp_path / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_content_than_records_is_named(tmp_path):
    (tmp_path / "t.json").write_text("5")
    with pytest.raises(StoreError, match="a JSON object is expected"):
        read_record(tmp_path / "t.json", TaskRecord)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(StoreError, match=r"latin\.jsonl: can't be read"):
        list(read_jsonl(tmp_path / "latin.jsonl"))


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_hash_ignores_key_order(values):
    assert content_hash(values) == content_hash(dict(reversed(values.items())))

"""Folders of models that were changed at random: they are read, or refused by an error of ours."""

from __future__ import annotations

from pathlib import Path

import fuzzing
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from fastunlearn.models import load_checkpoint
from fastunlearn.testing.checkpoints import save_tiny_checkpoint


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> dict[str, bytes]:
    return fuzzing.content_of(save_tiny_checkpoint(tmp_path_factory.mktemp("saved") / "pipeline"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("changed") / "files"


@given(data=st.data())
@fuzzing.examples(100)
def test_pipelines(data, pipeline, folder):
    change = data.draw(fuzzing.changes(sorted(pipeline)))
    fuzzing.check(fuzzing.Reader(pipeline, load_checkpoint), folder, change)

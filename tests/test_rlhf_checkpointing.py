"""Folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpointing import publishing, require_new, save_model


def test_a_folder_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "out"
    with publishing(folder) as partial:
        (partial / "file").write_text("x")
        assert not folder.exists()
        assert partial.parent == folder.parent  # one file system, so that the rename is one step
    assert [file.name for file in folder.iterdir()] == ["file"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, exception: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with publishing(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
            raise exception

    with pytest.raises(exception):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with publishing(tmp_path / "out") as partial:
            (partial / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (remnant,) = tmp_path.iterdir()
    assert remnant.name.startswith(".out.partial-")
    with publishing(tmp_path / "out"):  # and it is not in the way of a second attempt
        pass
    assert (tmp_path / "out").is_dir()


def test_existing_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="out: exists already; choose another --output or remove it"):
        require_new(tmp_path / "out")
    with pytest.raises(FileExistsError), publishing(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    assert require_new(tmp_path / "new") == tmp_path / "new"


def test_saved_models_load_with_from_pretrained(tmp_path: Path) -> None:
    model = make_llama(1)
    folder = save_model(model, make_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert (folder / "model.safetensors").is_file()

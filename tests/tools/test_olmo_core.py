"""OLMo-core's checkpoints, written by torch's own writer, in both of its dialects; and what is wrong in them."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_hybrid.tools.cli import ToolError
from megatron_hybrid.tools.convert import ExportOptions, export
from megatron_hybrid.tools.convert.common_state import adam_groups, read_common_state
from megatron_hybrid.tools.convert.dcp_writer import DcpWriter
from megatron_hybrid.tools.convert.hf_config import hf_config
from megatron_hybrid.tools.convert.info import InfoOptions, info
from megatron_hybrid.tools.convert.olmo_core import GDN_LAYER, core_names, stored_name
from megatron_hybrid.tools.convert.output_folder import write_json
from megatron_hybrid.tools.convert.safetensors_folder import read_folder, read_tensor
from megatron_hybrid.tools.convert.to_megatron import ImportOptions, import_model
from megatron_hybrid.tools.convert.to_olmo_core import OlmoCoreOptions, export_olmo_core
from megatron_hybrid.tools.dcp_reader import TorchDistCheckpoint
from tests.tools.tiny_model import TINY, random_hf_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FOUR = replace(TINY, hybrid_layer_pattern="GGG*")
MOMENTS = ("exp_avg", "exp_avg_sq")


def state_of(dialect: str, steps: float = 5.0) -> dict[str, Any]:
    """A model's state under OLMo-core's keys, moments made of the parameters."""
    names = core_names(FOUR, dialect)
    state: dict[str, Any] = {}
    for hf, tensor in random_hf_tensors(FOUR).items():
        state[f"model.{names[hf]}"] = tensor
        for number, moment in enumerate(MOMENTS, start=1):
            state[f"optim.state.{names[hf]}.{moment}"] = tensor * number + 0.5
        state[f"optim.state.{names[hf]}.step"] = torch.tensor(steps)
        state[f"optim.param_groups.{names[hf]}.lr"] = 3e-4
    return state


def written(folder: Path, state: dict[str, Any]) -> ImportOptions:
    """A stepN folder, and how to import it."""
    (folder / "step5").mkdir(parents=True)
    dcp.save(state, checkpoint_id=folder / "step5" / "model_and_optim", no_dist=True)
    (folder / "config").mkdir()
    write_json(folder / "config" / "config.json", hf_config(FOUR, "float32"))
    return ImportOptions(
        folder / "step5", folder / "megatron", config=folder / "config", optimizer=True, global_batch_size=8
    )


@pytest.mark.parametrize("dialect", GDN_LAYER)
def test_both_dialects_come_back(dialect: str, tmp_path: Path) -> None:
    options = written(tmp_path, state_of(dialect))
    assert f"names of its {dialect}" in info(InfoOptions(options.model, config=options.config))
    import_model(options)
    export(ExportOptions(options.output, tmp_path / "hf"))
    expected = random_hf_tensors(FOUR)
    found = {name: read_tensor(place) for name, place in read_folder(tmp_path / "hf").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    export_olmo_core(OlmoCoreOptions(options.output, tmp_path / "back", optimizer=True))
    wanted = {key: value for key, value in state_of("HEAD").items() if isinstance(value, torch.Tensor)}
    loaded = {key: torch.full_like(value, float("nan")) for key, value in wanted.items()}
    settings = {f"optim.param_groups.{name}.weight_decay": None for name in core_names(FOUR, "HEAD").values()}
    everything = loaded | settings
    dcp.load(everything, checkpoint_id=tmp_path / "back", no_dist=True)  # torch's own reader
    assert all(torch.equal(everything[key], value) for key, value in wanted.items())
    decays = {key: everything[key] for key in settings}
    assert decays.pop("optim.param_groups.embeddings.weight.weight_decay") == 0.0
    assert set(decays.values()) == {0.1}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    def refused(name: str, message: str, **changes: Any) -> None:
        options = written(tmp_path / name, state_of("HEAD") | changes)
        with pytest.raises(ToolError, match=message) as caught:
            import_model(options)
        assert "\n" not in str(caught.value) and not options.output.exists()

    place = "blocks.1.attention.o_norm.weight"
    refused(
        "shape",
        r"model.blocks.1.attention.o_norm.weight has shape \[24\], .* \[48\]",
        **{f"model.{place}": torch.ones(24)},
    )
    refused(
        "extra",
        r"model.blocks.4.attention_norm.weight has no place",
        **{"model.blocks.4.attention_norm.weight": torch.ones(1)},
    )
    step = stored_name(place, "step")
    refused("steps", rf"different optimizer steps \(.*{step} 6\)", **{step: torch.tensor(6.0)})
    refused("moment", r"exp_avg_sq is \[2\] instead of \[48\]", **{stored_name(place, "exp_avg_sq"): torch.ones(2)})
    options = written(tmp_path / "flags", state_of("HEAD"))
    with pytest.raises(ToolError, match=r"--global-batch-size None: --optimizer needs"):
        import_model(replace(options, global_batch_size=None))
    with pytest.raises(ToolError, match=r"an OLMo-core checkpoint; give --config FOLDER"):
        import_model(replace(options, config=None))
    import_model(replace(options, optimizer=False))
    with pytest.raises(ToolError, match=r"holds no state of Megatron's distributed Adam"):
        export_olmo_core(OlmoCoreOptions(options.output, tmp_path / "core", optimizer=True))
    assert not (tmp_path / "core").exists()


class Hostile:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_common_state_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    writer = DcpWriter(tmp_path / "checkpoint")
    group = {"step": 7.0, "lr": 1e-3, "hook": Hostile(tmp_path / "ran")}
    writer.add_object("common_state/shard_0_1", [{"optimizer": {"optimizer": {"param_groups": [group]}}}])
    writer.finish()
    reader = TorchDistCheckpoint(tmp_path / "checkpoint", megatron=False)
    assert adam_groups(reader)[0]["step"] == 7.0
    assert not (tmp_path / "ran").exists()
    with reader.open_object("common_state/shard_0_1") as view:
        torch.load(io.BytesIO(view.read()), weights_only=False)  # what it would have done
    assert (tmp_path / "ran").exists()
    file = next((tmp_path / "checkpoint").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[content.index(b"param_groups") + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ToolError, match=r"common_state/shard_0_1 (does not match|is unreadable)"):
        read_common_state(reader)

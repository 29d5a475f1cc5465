"""Flags of Megatron's that would do nothing here, or another thing than they say, are refused by `flags.check`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_hybrid.flags import FlagError, check, compose
from megatron_hybrid.presets import PRESETS
from megatron_hybrid.refusals import REFUSALS

ENV = Path(__file__).resolve().parents[1] / "examples" / "slurm" / "env"

#: {command line beside the 7B preset: what the refusal says, after the flag that it names}
REFUSED = {
    "--dataloader-inter-document-masking": "give --document-masking",
    "--dataloader-inter-document-masking --document-masking": "documents of a row would see each other",
    "--reset-attention-mask": "give --document-masking",
    "--reset-attention-mask --document-masking --no-document-masking": "give --document-masking",
    "--reset-position-ids": "give --document-masking",
    "--eod-mask-loss --instance-data x": "the end of a document is a target",
    "--last-target --instance-data x": "no token comes after the last one of an instance",
    "--data-seed 5": "the order of --data-path comes from --seed; give that",
    "--fim-data": "samples would be as without it; leave it out",
    "--sft": "--instance-label-mask",
    "--full-validation --instance-data x --instance-valid-data y": "leave it out, and give --eval-iters",
    "--iterations-to-skip 7 8": "ranks would read different batches",
    "--result-rejected-tracker-filename x": "ranks would read different batches",
    "--logits-load-dir x": "without distillation",
    "--logits-save-dir x --loss-chunk-tokens 2048": "take --loss-chunk-tokens 0",
    "--use-checkpoint-args": "give the flags that it was trained with",
    "--use-rotary-position-embeddings --position-embedding-type none": "leave one of them out",
    "--use-rotary-position-embeddings --position-embedding-type yarn": "leave one of them out",
    "--embedding-init-method-std 0.01": "its width is --init-method-std",
    "--init-method-xavier-uniform": "its width is --init-method-std",
    "--no-initialization": "give --load FOLDER",
    "--no-initialization --load x --fresh": "give --load FOLDER",
    "--init-model-with-meta-device": "whatever the memory held",
    "--apply-wd-to-qk-layernorm --weight-decay-on matrices": "take --weight-decay-on all_but_embedding",
    "--no-weight-decay-cond-type apply_wd_to_qk_layernorm --weight-decay-on matrices": "take --weight-decay-on",
    "--no-pad-vocab-size": "--make-vocab-size-divisible-by 1 adds no rows",
    "--disable-pad-vocab-size": "--make-vocab-size-divisible-by 1 adds no rows",
    "--yaml-cfg x": "give its settings as flags",
    "--defer-embedding-wgrad-compute --pipeline-model-parallel-size 2": "leave it out",
    "--hybrid-context-parallel": "give --context-parallel-size",
    "--tensor-parallel-num-weight-shards 2": "--tensor-model-parallel-size alone",
    "--fp32-residual-connection": "take --norm-placement pre",
    "--fp32-residual-connection --norm-placement post": "take --norm-placement pre",
    "--cuda-graph-impl local": "gradients of what modules/recompute.py computes again",
    "--enable-cuda-graph": "leave it out",
    "--external-cuda-graph": "leave it out",
    # architecture.py
    "--mscale 0.7 --position-embedding-type yarn": "lost in an export; leave it out",
    "--mscale-all-dim 1 --position-embedding-type yarn": "lost in an export; leave it out",
    "--no-yarn-correction-range-round-to-int --position-embedding-type yarn": "lost in an export; leave it out",
    "--hidden-dropout 0.1": "these models have no dropout; legal: 0",
    "--attention-dropout 0.1": "these models have no dropout; legal: 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_by_name(flags: str) -> None:
    with pytest.raises(FlagError) as caught:
        check(compose("olmo-hybrid-7b", [*flags.split(), "--mock-data"]))
    said = str(caught.value)
    named = " ".join(flags.split(" --")[0].split())
    assert said.startswith(f"{named}: ") and REFUSED[flags] in said and "\n" not in said


def test_every_refusal_is_tried() -> None:
    assert {refusal.flag for refusal in REFUSALS} <= {flags.split()[0].removeprefix("--") for flags in REFUSED}


@pytest.mark.parametrize(
    "flags",
    [
        "--document-masking --reset-attention-mask --reset-position-ids --eod-mask-loss",
        "--eod-mask-loss --last-target --full-validation",
        "--no-last-target --instance-data x --data-seed 5",
        "--data-seed -1",
        "--cuda-graph-impl none",
        "--logits-save-dir x --loss-chunk-tokens 0",
        "--logits-save-dir x",
        "--use-rotary-position-embeddings",
        "--embedding-init-method-std 0.02",
        "--embedding-init-method-std 0.01 --init-method-std 1e-2",
        "--no-initialization --load x",
        "--init-model-with-meta-device --load x",
        "--init-model-with-meta-device --use-megatron-fsdp --no-skip-step",
        "--apply-wd-to-qk-layernorm",
        "--no-pad-vocab-size --padded-vocab-size 100352",
        "--tensor-parallel-num-weight-shards 2 --tensor-model-parallel-size 2",
        "--fp32-residual-connection --norm-placement pre",
        f"--fp32-residual-connection --hybrid-layer-pattern {'G' * 32}",
        "--mscale 1.0 --mscale-all-dim 0 --yarn-correction-range-round-to-int --position-embedding-type yarn",
        "--hidden-dropout 0 --attention-dropout 0.0",
    ],
)
def test_what_works_stays_legal(flags: str) -> None:
    check(compose("olmo-hybrid-7b", [*flags.split(), "--mock-data"]))


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("hidden-dropout", "add it, as --hidden-dropout 0 (Megatron's default is 0.1)"),
        ("attention-dropout", "add it, as --attention-dropout 0 (Megatron's default is 0.1)"),
        ("norm-epsilon", "add it, as --norm-epsilon 1e-6 (Megatron's default is 1e-5)"),
        ("rotary-base", "add it, as --rotary-base 500000 (Megatron's default is 10000)"),
        ("calculate-per-token-loss", "change how much a token counts: add it"),
    ],
)
def test_without_a_preset_megatrons_default_is_not_taken(missing: str, said: str) -> None:
    flags = compose("olmo-hybrid-7b", ["--mock-data"], [missing])
    with pytest.raises(FlagError) as caught:
        check(flags)
    assert str(caught.value).startswith(f"--{missing}: missing; ") and said in str(caught.value)


def test_without_rotary_embeddings_there_is_no_base() -> None:
    check(compose("olmo-hybrid-7b", ["--mock-data", "--position-embedding-type", "none"], ["rotary-base"]))


def test_layers_of_ones_own_may_have_dropout() -> None:
    own = ["--spec", "my.module", "my_spec", "--hidden-dropout", "0.1", "--mock-data"]
    check(compose("olmo-hybrid-7b", own, ["norm-epsilon", "attention-dropout"]))
    with pytest.raises(FlagError, match="--calculate-per-token-loss: missing"):  # the loss is the plugin's
        check(compose("olmo-hybrid-7b", own, ["calculate-per-token-loss"]))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(preset: str) -> None:
    check(compose(preset, ["--mock-data"]))


@pytest.mark.parametrize("env", sorted(path.name for path in ENV.glob("*.env")))
def test_every_example_passes(env: str) -> None:
    """Its flags with its presets; what the launcher adds is in tests/slurm."""
    read = 'source "$1/site.env"; source "$1/$2"; printf "%s\\n" "${PRESET:-} ${ARRAY[*]}" "${FLAGS[@]}"'
    done = subprocess.run(["bash", "-c", read, "-", str(ENV), env], capture_output=True, text=True, check=True)
    presets, *flags = done.stdout.splitlines()
    for preset in presets.split():
        check(compose(preset, [*[word for word in flags if word], "--mock-data"]))

"""Recorded outputs of the authors' own code, in tests/data/parity, run by scripts/parity.py."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "parity"
CASES = sorted(path.parent.relative_to(DATA).as_posix() for path in DATA.glob("*/*/config.json"))


@pytest.fixture(scope="module")
def parity() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("parity")


@pytest.fixture(scope="module")
def verdicts(parity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one run over all cases says, by `system/case`."""
    path = tmp_path_factory.mktemp("parity") / "verdicts.json"
    parity.main([str(DATA), "--json", str(path)])
    return {f"{one['system']}/{one['case']}": one for one in json.loads(path.read_text())}


LACKING = {"eval/chair": "needs synonyms.txt of LisaAnne/Hallucination, which has no licence"}
"""Cases that are run only where someone put a file that may not be kept here."""


@pytest.mark.parametrize("case", CASES)
def test_mmzoo_reproduces_the_recorded_outputs(case: str, verdicts: dict[str, dict[str, Any]]) -> None:
    verdict = verdicts[case]
    if case in LACKING and verdict["verdict"] == "skipped":
        pytest.skip(LACKING[case])
    assert verdict["verdict"] == "pass", [tensor for tensor in verdict["tensors"] if not tensor["passed"]]
    assert verdict["tensors"]


def test_every_case_has_a_verdict_and_no_other(verdicts: dict[str, dict[str, Any]]) -> None:
    assert sorted(verdicts) == CASES
    systems = {
        "aki",
        "hf5-masked-lm",
        "cca-llava",
        "tc-llava",
        "visualchat",
        "mmca-attention",
        "video-ccam",
        "video-ccam-definition",
        "longlive",
        "arpg",
        "arflow",
        "vid-gpt",
        "favor",
        "eval",
        "lightning-attention",
        "hla2",
        "core-context-attention",
        "flashbias",
        "qk-sparse",
        "hash-sparse",
        "mosa",
        "relay-attention",
        "cca-compressed-conv",
    }
    assert {case.split("/")[0] for case in CASES} >= systems


def test_every_case_says_where_it_comes_from() -> None:
    assert (DATA / "README.md").exists()
    for case in CASES:
        assert "Source:" in (DATA / case / "README.md").read_text()


def test_a_verdict_names_its_tensors_and_its_largest_error(verdicts: dict[str, dict[str, Any]]) -> None:
    for verdict in verdicts.values():
        assert set(verdict) == {"system", "case", "verdict", "max_error", "tensors"}
        assert verdict["verdict"] in ("pass", "fail", "skipped")
        for tensor in verdict["tensors"]:
            assert set(tensor) == {"name", "max_error", "tolerance", "passed"}
        errors = [tensor["max_error"] for tensor in verdict["tensors"]]
        assert verdict["max_error"] == max(errors, default=None)


def copied(case: str, root: Path) -> Path:
    """A copy of one case that may be spoilt."""
    return Path(shutil.copytree(DATA / case, root / case))


def spoil(case: Path, name: str | None = None) -> None:
    """Change the last element of one expected tensor, or every element of all."""
    expected = load_file(case / "expected.safetensors")
    for part in [expected[name].view(-1)[-1]] if name else expected.values():
        part.copy_(part == 0)
    save_file(expected, case / "expected.safetensors")


def run(parity: ModuleType, root: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the verdicts."""
    code = parity.main([str(root), "--json", str(root / "verdicts.json"), *options])
    return code, json.loads((root / "verdicts.json").read_text())


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("longlive/block_masks", "mask2"),
        ("longlive/flow_scheduler", "x_t"),
        ("longlive/kv_recache_global_sink", "switch1_cache_k_block1"),
        ("longlive/lora", "x0_pred"),
        ("longlive/self_attention_cache", "indices"),
        ("favor/sync_audio_longer", "frame_visible"),
        ("favor/sync_audio_longer", "qformer_layer1_out"),
        ("favor/mrc_qformer", "inputs_llama"),
        ("video-ccam-definition/mask", "mask_T7_L3_N16_ceil"),
        ("video-ccam-definition/mask", "visible_frames_T96_N1024_block"),
        ("cca-llava/masks_positions", "layout4_position_ids"),
        ("cca-llava/masks_positions", "derived2_attention_allow"),
        ("cca-llava/masks_positions", "concentric_rings_24x24"),
        ("tc-llava/masks_positions", "frame_block_causal1"),
        ("tc-llava/masks_positions", "rope_position0_gamma0.5"),
        ("tc-llava/masks_positions", "next_token_position2"),
        ("visualchat/masks", "img_mask_state1"),
        ("visualchat/masks", "decode_txt_mask_state0"),
        ("aki/mask", "two_images.proposed_mask"),
        ("aki/resampler", "layers.0.attn_out"),
        ("hf5-masked-lm/qwen3_frame_block_causal", "grad_inputs_embeds"),
        ("cca-llava/attention_4x4", "attention_weights"),
        ("cca-llava/batch2", "logits_sample1"),
        ("cca-llava/tiny_model", "decode_position_ids"),
        ("tc-llava/attention", "output_alpha0.5_beta1_frame_block"),
        ("tc-llava/tiny_llm", "layer_output_0"),
        ("video-ccam-definition/projector", "output_frames_reversed"),
        ("video-ccam/glue_v10_phi3", "multi_logits"),
        ("video-ccam/glue_v10_phi3", "textonly_labels"),
        ("arpg/training_forward", "freqs_cis"),
        ("arpg/generate_linear_arccos", "logits_step3"),
        ("arpg/generate_constant_cosine", "tokens"),
        ("arflow/hybrid_linear_attention", "last_state"),
        ("lightning-attention/nodecay_n70", "final_state"),
        ("hla2/decay_algorithm1", "state_h"),
        ("core-context-attention/short_n12_below_window", "allowed"),
        ("flashbias/rank4_causal", "grad_k_bias"),
        ("qk-sparse/keys30_queries90_nonorm", "grad_k"),
        ("hash-sparse/hash8_per_head", "hash_k"),
        ("mosa/hybrid_dense", "topk_index"),
        ("relay-attention/b4_gqa", "lse_prefix"),
        ("cca-compressed-conv/gqa6_2_t4_3", "attn_out"),
    ],
)
def test_one_wrong_element_fails(parity: ModuleType, tmp_path: Path, case: str, tensor: str) -> None:
    spoil(copied(case, tmp_path), tensor)
    code, (verdict,) = run(parity, tmp_path)
    assert code == 1
    assert verdict["verdict"] == "fail"
    failed = [one for one in verdict["tensors"] if not one["passed"]]
    assert failed
    assert all(one["max_error"] > one["tolerance"] for one in failed)
    assert len(failed) < len(verdict["tensors"])


NOT_COMPARED = {"aki/mask": {"two_images.segment"}}
"""Notes of the recording that are no outputs."""


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if json.loads((DATA / case / "config.json").read_text())["kind"] in ("mask", "positions")],
)
def test_every_recorded_mask_and_position_is_compared(parity: ModuleType, tmp_path: Path, case: str) -> None:
    spoilt = copied(case, tmp_path)
    spoil(spoilt)
    code, (verdict,) = run(parity, tmp_path)
    assert code == 1
    failed = [one for one in verdict["tensors"] if not one["passed"]]
    assert len(failed) >= len(set(load_file(spoilt / "expected.safetensors")) - NOT_COMPARED.get(case, set()))


def test_a_tensor_of_another_shape_fails(parity: ModuleType, tmp_path: Path) -> None:
    case = copied("longlive/block_masks", tmp_path)
    expected = load_file(case / "expected.safetensors")
    save_file({**expected, "mask0": torch.ones(3, 3, dtype=torch.bool)}, case / "expected.safetensors")
    code, (verdict,) = run(parity, tmp_path)
    assert code == 1
    assert verdict["verdict"] == "fail"


def test_a_case_that_raises_fails_and_the_others_still_run(
    parity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (copied("longlive/block_masks", tmp_path) / "expected.safetensors").unlink()
    copied("visualchat/masks", tmp_path)
    code, verdicts = run(parity, tmp_path)
    assert code == 1
    assert [one["verdict"] for one in verdicts] == ["fail", "pass"]
    assert "1 pass, 1 fail, 0 skipped" in capsys.readouterr().out


def test_a_system_without_a_runner_is_listed_as_skipped(
    parity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "unheard-of" / "thing").mkdir(parents=True)
    (tmp_path / "unheard-of" / "thing" / "config.json").write_text('{"kind": "mask", "config": {}}')
    copied("visualchat/masks", tmp_path)
    code, (skipped, passed) = run(parity, tmp_path)
    assert code == 0
    assert passed["verdict"] == "pass"
    assert skipped == {
        "system": "unheard-of",
        "case": "thing",
        "verdict": "skipped",
        "max_error": None,
        "tensors": [],
    }
    printed = capsys.readouterr().out
    assert "unheard-of" in printed
    assert "1 pass, 0 fail, 1 skipped" in printed


def test_one_system_can_be_chosen(parity: ModuleType, tmp_path: Path) -> None:
    copied("longlive/block_masks", tmp_path)
    spoil(copied("visualchat/masks", tmp_path), "img_mask_state0")
    code, (verdict,) = run(parity, tmp_path, "--system", "longlive")
    assert code == 0
    assert verdict["system"] == "longlive"


def test_a_folder_without_cases_is_an_error(parity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert parity.main([str(tmp_path)]) == 1
    assert parity.main([str(DATA), "--system", "unheard-of"]) == 1
    assert "No cases" in capsys.readouterr().err

"""The Hub, against a server on loopback: push, pull, interruptions, access; seals; and what transformers reads."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hub_server import READER, WRITER, Fault, Hub
from huggingface_hub import constants, parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmzoo
from mmzoo import hub, integrity
from mmzoo.cli import app
from mmzoo.errors import CheckpointError, HubError, InputError
from mmzoo.language import MultimodalLM

TINY = mmzoo.list_models("*-tiny", library="transformers")
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="session")
def one_server() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def server(one_server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The server, empty, for a client that is online, waits for nothing, and has a cache of its own."""
    for record in (one_server.repos, one_server.large, one_server.requests, one_server.ranges, one_server.faults):
        record.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))
    return one_server


def access(server: Hub, token: str | None = WRITER) -> dict[str, Any]:
    return {"endpoint": server.endpoint, "token": token}


def tiny(name: str = "aki-tiny", seed: int = 0) -> MultimodalLM:
    torch.manual_seed(seed)
    return mmzoo.create(name)


def logits(model: Any, processor: Any = None) -> torch.Tensor:
    picture = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    asked = (processor or model.processor).ask("what colour is the circle", image=picture.numpy())
    with torch.no_grad():
        return model(**asked).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(server: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = server.repos[repo].files(revision)
    assert found is not None
    return {path: content for path, content in found[1].items() if path != ".gitattributes"}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save(tiny(), tmp_path_factory.mktemp("saved") / "model", max_shard_size="100KB")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


# Push and pull


@pytest.mark.parametrize("name", TINY)
def test_what_is_pushed_is_what_is_loaded(name: str, server: Hub) -> None:
    model = tiny(name)
    address = mmzoo.push(model, "org/pushed", **access(server))
    assert address.startswith(f"{server.endpoint}/org/pushed/commit/")
    again = mmzoo.load("hf-hub:org/pushed", **access(server))
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.processor.to_dict() == model.processor.to_dict()


def test_a_dry_run_writes_what_is_uploaded_byte_for_byte(server: Hub, tmp_path: Path) -> None:
    options: dict[str, Any] = {"license": "mit", "datasets": ["org/clips"], "max_shard_size": "100KB"}
    folder = mmzoo.push(tiny(), "org/pushed", **options, dry_run=tmp_path / "dry")
    assert not server.requests
    mmzoo.push(tiny(), "org/pushed", **options, **access(server))
    assert files(Path(folder)) == on_hub(server, "org/pushed")
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    with pytest.raises(InputError, match="not empty"):
        mmzoo.push(tiny(), "org/pushed", dry_run=folder)


def test_weights_of_an_earlier_push_do_not_stay(server: Hub) -> None:
    mmzoo.push(tiny(), "org/pushed", max_shard_size="100KB", **access(server))
    model = tiny(seed=1)
    mmzoo.push(model, "org/pushed", **access(server))
    assert {path for path in on_hub(server, "org/pushed") if "model" in path} == {"model.safetensors"}
    assert torch.equal(logits(mmzoo.load("hf-hub:org/pushed", **access(server))), logits(model))


def test_weights_of_an_earlier_save_do_not_stay(copied: Path) -> None:
    model = tiny(seed=1)
    (copied / "model_of_mine.safetensors").touch()
    hub.save(model, copied)
    assert {path.name for path in copied.glob("model*")} == {"model.safetensors", "model_of_mine.safetensors"}
    assert torch.equal(logits(mmzoo.load(str(copied))), logits(model))


def test_a_push_by_transformers_name_is_the_same(server: Hub) -> None:
    for repo, push in (("org/one", tiny().push_to_hub), ("org/two", lambda *a, **k: mmzoo.push(tiny(), *a, **k))):
        push(repo, **access(server))
    one, two = on_hub(server, "org/one"), on_hub(server, "org/two")
    assert one.pop("README.md").replace(b"org/one", b"org/two") == two.pop("README.md")
    assert one == two


def test_revisions(server: Hub) -> None:
    models = {"main": tiny(), "next": tiny(seed=1)}
    for branch, model in models.items():
        mmzoo.push(model, "org/pushed", revision=None if branch == "main" else branch, **access(server))
    for branch, model in models.items():
        again = mmzoo.load(f"hf-hub:org/pushed@{branch}", **access(server))
        assert torch.equal(logits(again), logits(model))
    assert 'load("hf-hub:org/pushed@next")' in on_hub(server, "org/pushed", "next")["README.md"].decode()
    with pytest.raises(CheckpointError, match="no such branch"):
        mmzoo.load("hf-hub:org/pushed@other", **access(server))


def test_a_private_repository_needs_a_token_that_may_see_it(server: Hub) -> None:
    mmzoo.push(tiny(), "org/secret", private=True, **access(server))
    assert server.repos["org/secret"].private
    for token in (None, "hf_stranger"):
        with pytest.raises(CheckpointError, match="private: log in with `hf auth login`"):
            mmzoo.load("hf-hub:org/secret", **access(server, token))
    assert mmzoo.load("hf-hub:org/secret", **access(server, READER)).processor is not None


def test_a_stored_login_is_used(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    mmzoo.push(tiny(), "org/secret", private=True, endpoint=server.endpoint)
    assert mmzoo.load("hf-hub:org/secret", endpoint=server.endpoint).processor is not None


def test_a_gated_repository(server: Hub) -> None:
    mmzoo.push(tiny(), "org/gated", **access(server))
    server.repos["org/gated"].gated = True
    with pytest.raises(CheckpointError, match="gated: ask for access"):
        mmzoo.load("hf-hub:org/gated", **access(server, READER))


@pytest.mark.parametrize("token", [READER, "hf_stranger"])
def test_a_token_that_may_not_write(server: Hub, token: str) -> None:
    with pytest.raises(HubError, match="(?s)Cannot push to org/pushed: .*hf auth login"):
        mmzoo.push(tiny(), "org/pushed", **access(server, token))


def test_a_hub_that_is_not_there() -> None:
    with pytest.raises(HubError, match="Cannot push to org/pushed: OfflineModeIsEnabled"):
        mmzoo.push(tiny(), "org/pushed", token=WRITER)


# Interruptions


def test_an_interrupted_download_goes_on_where_it_was(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    mmzoo.push(model := tiny(), "org/pushed", **access(server))
    server.faults.append(Fault("GET", "/large/", bytes_sent=50_000))
    again = mmzoo.load("hf-hub:org/pushed", **access(server))
    assert torch.equal(logits(again), logits(model))
    (asked,) = server.ranges
    assert 0 < int(asked.removeprefix("bytes=").split("-")[0]) <= 50_000


def test_a_download_that_breaks_again_and_again_is_an_error_and_then_goes_on(server: Hub) -> None:
    mmzoo.push(model := tiny(), "org/pushed", **access(server))
    fault = Fault("GET", "/large/", bytes_sent=50_000, times=1000)
    server.faults.append(fault)
    with pytest.raises(CheckpointError, match="Cannot download hf-hub:org/pushed.*\n.*Try again"):
        mmzoo.load("hf-hub:org/pushed", **access(server))
    fault.times, before = 0, server.seen("GET", "tokenizer.json")
    assert torch.equal(logits(mmzoo.load("hf-hub:org/pushed", **access(server))), logits(model))
    assert before and server.seen("GET", "tokenizer.json") == before


def test_a_broken_upload_sends_only_what_is_missing(server: Hub) -> None:
    """Each large file arrives once: those before the break are not sent again."""
    options: dict[str, Any] = {"max_shard_size": "60KB", **access(server)}
    mmzoo.push(tiny(seed=1), "org/other", **options)
    shards = len(server.large)
    assert shards > 2
    server.large.clear()
    server.requests.clear()
    fault = Fault("POST", "/verify", status=403, times=1)
    server.faults.append(fault)
    with pytest.raises(HubError, match="Cannot push to org/pushed"):
        mmzoo.push(tiny(), "org/pushed", **options)
    assert on_hub(server, "org/pushed") == {}
    arrived = server.seen("PUT", "/large/")
    assert 0 < arrived == len(server.large)
    mmzoo.push(tiny(), "org/pushed", **options)
    assert server.seen("PUT", "/large/") == shards == len(server.large)
    sent = len(server.requests)
    mmzoo.push(tiny(), "org/pushed", **options)
    assert not [one for one in server.requests[sent:] if one[0] == "PUT" or "/commit/" in one[1]]


def test_a_storage_that_stumbles_once_is_asked_again(server: Hub) -> None:
    server.faults.append(Fault("PUT", "/large/", status=500))
    mmzoo.push(model := tiny(), "org/pushed", **access(server))
    assert server.seen("PUT", "/large/") == 2
    assert torch.equal(logits(mmzoo.load("hf-hub:org/pushed", **access(server))), logits(model))


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_a_partial_download_is_not_loaded_offline(listed: bool, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cached listing of the repository, huggingface_hub returns the folder as it is."""
    mmzoo.push(tiny(), "org/pushed", max_shard_size="100KB", **access(server))
    folder = hub.locate("hf-hub:org/pushed", **access(server))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert mmzoo.load("hf-hub:org/pushed").processor is not None
    if not listed:
        shutil.rmtree(folder.parents[1] / "trees")
    for path in sorted(folder.iterdir()):
        hidden = path.rename(folder.parent / "hidden")
        with pytest.raises(CheckpointError):
            mmzoo.load("hf-hub:org/pushed")
        hidden.rename(path)


# Adapters


def adapted(model: MultimodalLM, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    found = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False))
    return found.eval()


@pytest.fixture
def base(server: Hub) -> str:
    mmzoo.push(tiny(), "org/base", license="cc-by-nc-4.0", **access(server))
    return "hf-hub:org/base"


def test_an_adapter_is_pushed_alone_and_loaded_with_its_base(base: str, server: Hub, tmp_path: Path) -> None:
    model = adapted(mmzoo.load(base, **access(server)))
    mmzoo.push(model, "org/adapter", adapter=True, datasets=["org/clips"], **access(server))
    pushed = on_hub(server, "org/adapter")
    assert pushed.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    metadata = front_matter(pushed["README.md"].decode())
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "adapter")
    assert metadata["datasets"] == ["org/clips"]
    again = mmzoo.load("hf-hub:org/adapter", **access(server))
    torch.testing.assert_close(logits(again), logits(model, again.processor))
    assert not torch.allclose(logits(again), logits(mmzoo.load(base, **access(server))))

    model.save_pretrained(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    described["target_modules"] = described["target_modules"][::-1]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    mmzoo.push(tmp_path / "adapter", "org/same", adapter=True, datasets=["org/clips"], **access(server))
    assert {**on_hub(server, "org/same"), "README.md": b""} == {**pushed, "README.md": b""}
    mmzoo.push("hf-hub:org/adapter", "org/merged", **access(server))
    assert torch.equal(logits(mmzoo.load("hf-hub:org/merged", **access(server))), logits(again))


def test_an_adapter_names_a_base_that_others_can_load(server: Hub, saved: Path, tmp_path: Path) -> None:
    model = adapted(mmzoo.load(str(saved)))
    with pytest.raises(InputError, match="base='hf-hub:org/name'"):
        mmzoo.push(model, "org/adapter", adapter=True, dry_run=tmp_path / "one")
    folder = mmzoo.push(model, "org/adapter", adapter=True, base="hf-hub:a/b@v1", dry_run=tmp_path / "two")
    described = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("a/b", "v1")
    nano = adapted(mmzoo.load("aki-nano"))
    mmzoo.push(nano, "org/adapter", adapter=True, dry_run=tmp_path / "three")
    again = mmzoo.load(str(tmp_path / "three"))
    torch.testing.assert_close(logits(again), logits(nano, again.processor))


def test_what_is_no_adapter_or_more_than_one_is_refused(base: str, server: Hub, tmp_path: Path) -> None:
    model = adapted(mmzoo.load(base, **access(server)))
    with pytest.raises(InputError, match="adapter=True"):
        mmzoo.push(model, "org/adapter", **access(server))
    with pytest.raises(InputError, match="peft's model, or the folder"):
        mmzoo.push(tiny(), "org/adapter", adapter=True, **access(server))
    with pytest.raises(InputError, match="base is for adapters"):
        mmzoo.push(tiny(), "org/adapter", base=base, **access(server))
    with pytest.raises(HubError, match="holds a whole model"):
        mmzoo.push(model, "org/base", adapter=True, **access(server))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen", "gone", "nameless", "bit"])
def test_a_damaged_adapter_is_a_checkpoint_error(damage: str, saved: Path, tmp_path: Path) -> None:
    adapted(mmzoo.load(str(saved))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert mmzoo.load(str(tmp_path)).processor is not None
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["base_model.model.nothing.lora_A.weight"] = torch.zeros(1)
    elif damage == "misshapen":
        tensors[first] = torch.zeros(3, 3)
    save_file(tensors, path)
    if damage == "gone":
        path.unlink()
    elif damage == "nameless":
        described = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": None}))
    elif damage == "bit":
        integrity.seal(tmp_path)
        flip_last(path)
    with pytest.raises(CheckpointError):
        mmzoo.load(str(tmp_path))


# Cards and scores


def scores(**changes: Any) -> dict[str, Any]:
    value = {"value": 31.3, "stderr": 3.2, "n": 200}
    label = "MVBench (official, 16 frames, decord 0.6.0)"
    given = {"benchmark": "MVBench", "protocol": "official", "label": label, "scores": {"accuracy": value}}
    return {**given, "date": "2026-11-26", "dataset_id": "OpenGVLab/MVBench", **changes}


def test_scores_stand_in_the_card_and_in_the_hubs_format(tmp_path: Path) -> None:
    other = scores(benchmark="World", label="World (exact)", dataset_id=None, scores={"accuracy": {"value": 97}})
    (tmp_path / "scores.json").write_text(json.dumps([scores(), other]))
    folder = Path(mmzoo.push(tiny(), "org/x", eval_results=[tmp_path / "scores.json"], dry_run=tmp_path / "dry"))
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["mvbench.yaml"]
    (found,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "mvbench.yaml").read_text()))
    assert (found.dataset_id, found.task_id, found.value) == ("OpenGVLab/MVBench", "accuracy", 31.3)
    assert found.date == "2026-11-26"
    assert found.notes == "MVBench (official, 16 frames, decord 0.6.0), stderr 3.2, n 200"
    card = (folder / "README.md").read_text()
    assert "| MVBench (official, 16 frames, decord 0.6.0) | accuracy | 31.3 | 3.2 | 200 |" in card
    assert "| World (exact) | accuracy | 97 |" in card


@pytest.mark.parametrize("content", ["{", "3", json.dumps({}), json.dumps(scores(scores={"accuracy": 3}))])
def test_scores_that_cannot_be_used(content: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(InputError, match="scores.json"):
        mmzoo.push(tiny(), "org/x", eval_results=[tmp_path / "scores.json"], dry_run=tmp_path / "dry")


def test_the_card_of_a_registered_model(tmp_path: Path) -> None:
    mmzoo.push("aki-nano", "org/nano", datasets=["org/clips"], dry_run=tmp_path / "dry")
    card = (tmp_path / "dry" / "README.md").read_text()
    metadata = front_matter(card)
    assert metadata["library_name"] == "mmzoo"
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["org/clips"]
    assert {"mmzoo", "modality-mutual", "sequential", "arxiv:2503.02597"} <= set(metadata["tags"])
    assert card.startswith("---\n") and "# aki-nano\n" in card and 'mmzoo.load("hf-hub:org/nano")' in card
    assert "mmzoo eval run hf-hub:org/nano world" in card  # it knows nothing else


def test_the_card_of_a_model_made_from_another(base: str, server: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    causal = mmzoo.create("video-ccam-tiny", rule="sliding-window", rule_options={"window": 9})
    mmzoo.push(causal, "org/own", license="mit", dry_run=tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert {"sliding-window", "ccam"} <= set(front_matter(card)["tags"])
    assert front_matter(card)["license"] == "mit" and "base_model" not in front_matter(card)
    assert repr(causal.rule) in card and repr(causal.connector_rule) in card
    mmzoo.push(mmzoo.load(base, **access(server)), "org/tuned", dry_run=tmp_path / "tuned")
    assert front_matter((tmp_path / "tuned" / "README.md").read_text())["base_model"] == ["org/base"]
    mmzoo.push(mmzoo.load("aki-nano"), "org/tuned", dry_run=tmp_path / "nano")
    assert front_matter((tmp_path / "nano" / "README.md").read_text())["license"] == "apache-2.0"


# transformers


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_every_family_without_remote_code(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    import mmzoo.hf  # noqa: F401

    model = tiny(name)
    folder = hub.save(model, tmp_path, max_shard_size="100KB")
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is type(model.processor)
    text = "what colour is the <image>"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == model.processor.tokenizer(text).input_ids
    for kind in (AutoModel, AutoModelForImageTextToText):
        again = kind.from_pretrained(folder)
        assert type(again) is type(model)
        assert torch.equal(logits(again.eval(), processor), logits(model))


@pytest.mark.slow
def test_transformers_loads_a_branch_from_the_hub(server: Hub) -> None:
    """In a process of its own, since transformers reads the Hub's address when it is imported."""
    models = {"main": tiny("cca-llava-tiny"), "next": tiny("cca-llava-tiny", seed=1)}
    models["next"].processor.image_processor.image_mean = [0.25, 0.5, 0.75]
    for branch, model in models.items():
        mmzoo.push(model, "org/pushed", revision=None if branch == "main" else branch, **access(server))
    code = (
        "import json, mmzoo.hf\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "from test_hub import logits\n"
        "place = {'revision': 'next'}\n"
        "model = AutoModel.from_pretrained('org/pushed', **place).eval()\n"
        "print(json.dumps(logits(model, AutoProcessor.from_pretrained('org/pushed', **place)).tolist()))\n"
    )
    online = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, **online, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), logits(models["next"]))


# Conversion and the command


def test_convert_writes_our_format_with_digests_and_a_card(copied: Path, tmp_path: Path) -> None:
    shard = next(iter(copied.glob("*.safetensors")))
    save_file(load_file(shard), shard, metadata={"format": "pt"})
    for path in copied.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    folder = hub.convert(str(copied), tmp_path / "converted")
    assert integrity.seal_of(folder / "model.safetensors")
    assert "aki" in front_matter((folder / "README.md").read_text())["tags"]
    assert torch.equal(logits(mmzoo.load(str(folder))), logits(mmzoo.load(str(copied))))
    hub.convert("aki-nano", tmp_path / "nano", dtype=torch.bfloat16)
    assert mmzoo.load(str(tmp_path / "nano")).dtype == torch.bfloat16
    assert "# aki-nano" in (tmp_path / "nano" / "README.md").read_text()
    with pytest.raises(InputError, match="the source itself"):
        hub.convert(str(copied), copied)


def test_the_commands(saved: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    (tmp_path / "scores.json").write_text(json.dumps(scores()))
    options = ("--license", "mit", "--dataset", "org/a", "--eval-results", tmp_path / "scores.json")
    done = run("push", saved, "org/x", *options, "--dry-run", tmp_path / "dry")
    assert done.exit_code == 0 and str(tmp_path / "dry") in done.output
    assert front_matter((tmp_path / "dry" / "README.md").read_text())["license"] == "mit"
    assert (tmp_path / "dry" / ".eval_results" / "mvbench.yaml").is_file()
    done = run("convert", saved, tmp_path / "half", "--dtype", "float16")
    assert done.exit_code == 0 and mmzoo.load(str(tmp_path / "half")).dtype == torch.float16
    assert isinstance(run("convert", saved, tmp_path / "b", "--dtype", "int4").exception, InputError)
    adapted(mmzoo.load(str(saved))).save_pretrained(tmp_path / "adapter")
    options = ("--adapter", "--base", "hf-hub:org/base", "--dry-run", tmp_path / "lora")
    assert run("push", tmp_path / "adapter", "org/x", *options).exit_code == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert isinstance(run("push", saved, "org/x").exception, HubError)


# Seals


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_seal_holds_every_tensor_and_small_file(saved: Path) -> None:
    model = tiny()
    seals = {path.name: integrity.seal_of(path) for path in saved.glob("*.safetensors")}
    assert len(seals) > 1
    whole = {seal["sha256.weights"] for seal in seals.values()}
    assert whole == {integrity.weights_sha256({name: x for name, x in model.state_dict().items()})}
    tensors = {name: digest for seal in seals.values() for name, digest in seal.items() if ".tensor." in name}
    assert tensors == {f"sha256.tensor.{name}": integrity.tensor_sha256(x) for name, x in model.state_dict().items()}
    small = {path.name for path in saved.iterdir() if path.suffix != ".safetensors"}
    for path, seal in ((saved / name, seal) for name, seal in seals.items()):
        assert {key.removeprefix("sha256.file.") for key in seal if ".file." in key} == small
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            offsets = int.from_bytes(path.read_bytes()[:8], "little")
            assert offsets % 8 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_of_every_kind_are_sealed(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"one": torch.ones(shape).to(dtype), "two": torch.zeros(5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    integrity.seal(tmp_path)
    integrity.verify(tmp_path, ["model.safetensors"])
    again = load_file(tmp_path / "model.safetensors")
    assert again["one"].dtype == dtype and torch.equal(again["one"].float(), tensors["one"].float())
    flip_last(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not what was saved: (one|two)"):
        integrity.verify(tmp_path, ["model.safetensors"])


def test_verification_can_be_skipped(copied: Path) -> None:
    path = next(iter(copied.glob("*.safetensors")))
    flip_last(path)
    with pytest.raises(CheckpointError, match="verify=False"):
        mmzoo.load(str(copied))
    with pytest.raises(CheckpointError, match="not what was saved"):
        hub.read_file(path)
    assert mmzoo.load(str(copied), verify=False).processor is not None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_small_file_that_still_reads_is_not_taken_for_the_saved_one(name: str, copied: Path) -> None:
    described = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=f"{name} is damaged or was changed.*not the file that was saved"):
        mmzoo.load(str(copied))
    assert mmzoo.load(str(copied), verify=False).processor is not None


def test_a_file_without_digests_among_sealed_ones_is_refused(copied: Path) -> None:
    path = next(iter(copied.glob("*.safetensors")))
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks the digests"):
        mmzoo.load(str(copied))


def test_a_shard_of_another_checkpoint_is_known(copied: Path, tmp_path: Path) -> None:
    other = hub.save(tiny(seed=1), tmp_path / "other", max_shard_size="100KB")
    for path in list(copied.glob("*.safetensors"))[:1]:
        shutil.copy(other / path.name, path)
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        mmzoo.load(str(copied))


def test_checkpoints_without_digests_load_as_before(tmp_path: Path) -> None:
    model = tiny()
    model.write_files(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert not integrity.seal_of(tmp_path / "model.safetensors")
    assert torch.equal(logits(mmzoo.load(str(tmp_path))), logits(model))
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "text_config": "nothing"}))
    with pytest.raises(CheckpointError, match="Cannot read the configuration"):
        mmzoo.load(str(tmp_path))


def test_what_the_index_or_the_seal_names_is_inside_the_folder(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    for path in copied.glob("*.safetensors"):
        integrity._add_metadata(path, {"sha256.file.../secret.json": integrity.file_sha256(tmp_path / "secret.json")})
    with pytest.raises(CheckpointError, match="secret.json"):
        mmzoo.load(str(copied))


@pytest.mark.parametrize("named", ["../model.safetensors", "/etc/passwd", 3, None, ["a"], {}])
def test_an_index_names_files_of_the_folder(named: object, copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"] = dict.fromkeys(described["weight_map"], named)
    index.write_text(json.dumps(described))
    for verify in (True, False):
        with pytest.raises(CheckpointError):
            mmzoo.load(str(copied), verify=verify)


def test_links_stay_inside_the_folder(copied: Path, tmp_path: Path) -> None:
    path = copied / "tokenizer.json"
    inside = path.rename(copied / "kept.json")
    path.symlink_to(inside.name)
    hub.locate(str(copied))
    path.unlink()
    path.symlink_to(shutil.move(inside, tmp_path / "outside.json"))
    with pytest.raises(CheckpointError, match="tokenizer.json is a link to .*outside.json"):
        hub.locate(str(copied))
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        mmzoo.load(str(copied))


def test_the_format_is_what_transformers_expects(copied: Path) -> None:
    integrity._add_metadata(next(iter(copied.glob("*.safetensors"))), {"format": "qt"})
    with pytest.raises(CheckpointError, match="its format is 'qt'"):
        mmzoo.load(str(copied))


@pytest.mark.parametrize("seed", range(12))
def test_code_that_a_configuration_names_is_not_run(seed: int, copied: Path) -> None:
    script("damaged_checkpoints").code_in_the_configuration(copied, random.Random(seed), copied)
    with contextlib.suppress(CheckpointError):
        mmzoo.load(str(copied), verify=False)
    assert not (copied.parent / "executed").exists()


# Damage of every kind


def script(name: str) -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_checkpoints(count: int) -> None:
    damaged = script("damaged_checkpoints")
    found = damaged.run(count)
    assert damaged.failures(found) == 0
    assert sum(number for one in found[True].values() for number in one.values()) == count + damaged.CONTROLS
    assert set(found[True]["none"]) == {"identical"}
    assert damaged.DIFFERENT in found[False]["a bit of the data"]


@pytest.mark.parametrize("count", [28, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_videos(count: int) -> None:
    damaged = script("damaged_videos")
    found = damaged.run(count)
    assert damaged.failures(found) == 0
    assert {said for kinds in found.values() for one in kinds.values() for said in one} == set(damaged.GOOD)


def test_the_page_tells_the_counts_of_the_last_run() -> None:
    root = Path(__file__).parents[1]
    page, results = (root / "docs" / "hub.md").read_text(), root / "benchmarks" / "results"
    found = {name: json.loads((results / f"damaged_{name}.json").read_text()) for name in ("checkpoints", "videos")}
    assert [(one["count"], one["failures"]) for one in found.values()] == [(1000, 0)] * 2
    for kind, one in found["checkpoints"]["verified"].items():
        assert f"| {kind} | {one.get('CheckpointError', 0)} | {one.get('identical', 0)} | " in page
    for kind, one in found["videos"]["outcomes"]["mp4"].items():
        assert f"| {kind} | {one.get('frames', 0)} | {one.get('VideoReadError', 0)} | " in page

"""Checkpoints from a Hub, through huggingface_hub itself, each in a process and a cache of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdfast.export.checkpoint import resolve
from tests.checkpoints import build_ip_adapter, build_sd, build_tiny_vae
from tests.hub.server import TOKEN, Hub, Repo, commit_of, serve

# Answers each line of input, a resolve() call in JSON, with a line of output: what it got, or the error.
PROGRAM = """
import json, sys, time
from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import resolve
for line in sys.stdin:
    steps = []
    try:
        found = resolve(progress=steps.append, **json.loads(line))
        answer = {"folder": str(found.folder), "revision": found.revision, "digests": found.digests()}
        answer["tensors"] = {name: len(found.state_dict(name)) for name in found.components}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "steps": steps}), flush=True)
"""
IMPATIENT = "import time\ntime.sleep = lambda seconds: None\n"  # no waiting between retries


def start(hub: Hub, program: str = IMPATIENT + PROGRAM, **env: str) -> subprocess.Popen[str]:
    """A process of its own, because huggingface_hub reads its environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    local = {
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": "/nonexistent",
    }
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**kept, **quiet, **local, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], source: str, home: Path, **arguments: Any) -> Any:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps({"source": source, "cache_dir": str(home), **arguments}) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Hub, subprocess.Popen[str]]]:
    with serve(Hub()) as hub, start(hub) as process:
        yield hub, process
        process.terminate()


@pytest.fixture
def hub(running: tuple[Hub, Any], tiny_sd: Path) -> Hub:
    """The hub, in order, with one model: org/tiny."""
    hub = running[0]
    hub.repos = {"org/tiny": Repo({"main": tiny_sd})}
    hub.cut, hub.cuts, hub.broken = None, 0, False
    hub.requests.clear()
    return hub


@pytest.fixture
def fetch(running: tuple[Any, subprocess.Popen[str]], hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    """Resolve a source, org/tiny unless said, in a cache of its own."""

    def fetch(source: str = "org/tiny", home: Path = tmp_path / "home", **arguments: Any) -> Any:
        return ask(running[1], source, home, **arguments)

    return fetch


def fetch_once(hub: Hub, home: Path, source: str = "org/tiny", **env: str) -> Any:
    """The same in a new process, with an environment of its own."""
    with start(hub, **env) as process:
        answer = ask(process, source, home)
        process.terminate()
    return answer


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_checkpoint_comes_whole_and_nothing_else(
    hub: Hub, fetch: Callable[..., Any], tiny_sd: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_sd, tmp_path / "repo")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "v1-5.ckpt",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / name).write_bytes(b"x" * 100)
    for name in ("safety_checker/model.safetensors", "feature_extractor/a.json", "unet/x.py", "a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    hub.repos["org/tiny"] = Repo({"main": folder})
    found = fetch()
    assert found["revision"] == commit_of(folder) == Path(found["folder"]).name
    assert set(found["tensors"]) == {"text_encoder", "unet", "vae"} and min(found["tensors"].values()) > 10
    assert hub.fetched() == {path.relative_to(tiny_sd).as_posix() for path in tiny_sd.rglob("*.*")}
    assert any("GB" in step for step in found["steps"])


def test_a_second_time_nothing_is_fetched_and_offline_works(
    hub: Hub, fetch: Callable[..., Any], tmp_path: Path
) -> None:
    first = fetch()
    hub.requests.clear()
    assert fetch()["folder"] == first["folder"] and hub.fetched() == set()
    hub.requests.clear()
    offline = fetch_once(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    for again in (offline, fetch(local_files_only=True)):
        assert again["digests"] == first["digests"] and again["revision"] == first["revision"]
    assert hub.requests == []
    hub.broken = True
    assert fetch()["folder"] == first["folder"]
    gone = fetch_once(hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone["folder"] == first["folder"]


def test_revisions(hub: Hub, fetch: Callable[..., Any], tiny_sd: Path, tmp_path: Path) -> None:
    other = build_sd(tmp_path / "other", seed=1)
    hub.repos["org/tiny"] = Repo({"main": tiny_sd, "v2": other, "fix/a b": other})
    by_tag, by_branch = fetch(revision="v2"), fetch(revision="fix/a b")
    by_commit, main = fetch(revision=commit_of(other)), fetch()
    assert by_tag["revision"] == by_branch["revision"] == by_commit["revision"] == commit_of(other)
    assert main["revision"] == commit_of(tiny_sd) and main["digests"] != by_tag["digests"]
    page = f"{hub.url}/org/tiny/tree/main"
    for wrong in ("v3", "0" * 40):
        assert fetch(revision=wrong)["error"] == (
            f"org/tiny has no revision {wrong!r}; its branches and tags are listed at {page}"
        )


@pytest.mark.parametrize("revision", ["", "../main", "/etc", "a/../b", "a\nb", "a?b=c"])
def test_what_cannot_be_a_revision_is_not_asked_for(
    hub: Hub, fetch: Callable[..., Any], revision: str
) -> None:
    assert "is not the name of a branch, a tag or a commit" in fetch(revision=revision)["error"]
    assert hub.requests == []


def test_variants_and_shards(hub: Hub, fetch: Callable[..., Any], tmp_path: Path) -> None:
    folder = build_sd(tmp_path / "repo", variant="fp16", max_shard_size="200KB")
    shards = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")}
    assert len(shards) > 5
    hub.repos["org/tiny"] = Repo({"main": folder})
    refused = fetch()
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    assert "text_encoder has no weights of the default variant" in refused["error"]
    assert "variant='fp16'" in refused["error"]
    assert set(fetch(variant="fp16")["digests"]) == shards


def test_what_cannot_be_had(hub: Hub, fetch: Callable[..., Any], tiny_sd: Path, tmp_path: Path) -> None:
    hub.repos["org/gated"] = Repo({"main": tiny_sd}, gated=True)
    hub.repos["org/private"] = Repo({"main": tiny_sd}, private=True)
    missing = fetch("org/missing")["error"]
    assert missing.startswith(f"org/missing: no such model on {hub.url}, nor a folder or file of that name")
    assert "org/gated is gated: accept its conditions at" in fetch("org/gated")["error"]
    assert "org/private: no such model" in fetch("org/private")["error"]
    for repo in ("org/gated", "org/private"):
        wrong = fetch(repo, token="hf_wrong")["error"]
        assert wrong == f"{repo}: {hub.url} refused the token; log in again (hf auth login) or unset HF_TOKEN"
        assert fetch(repo, token=TOKEN)["revision"] == commit_of(tiny_sd)
    assert fetch_once(hub, tmp_path / "other", "org/gated", HF_TOKEN=TOKEN)["revision"] == commit_of(tiny_sd)


def test_no_connection_and_no_cache(hub: Hub, fetch: Callable[..., Any], tmp_path: Path) -> None:
    nowhere = fetch_once(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    offline = fetch_once(hub, tmp_path, HF_HUB_OFFLINE="1")
    hub.broken = True
    for answer in (nowhere, offline, fetch(), fetch(local_files_only=True)):
        assert answer["error"].startswith("org/tiny is not complete in the local cache, and ")
        assert answer["error"].endswith("check the connection and HF_HUB_OFFLINE, or give a folder")


@pytest.mark.parametrize("name", ["a/b--c", "a/b..c", "-a/b", "a/" + "b" * 200, "a/b.git"])
def test_ids_that_the_hub_cannot_have(fetch: Callable[..., Any], name: str) -> None:
    error = fetch(name)["error"]
    assert "\n" not in error and name in error


def test_a_cut_connection_is_taken_up_again(hub: Hub, fetch: Callable[..., Any]) -> None:
    hub.cut, hub.cuts = "unet/diffusion_pytorch_model.safetensors", 1
    assert fetch()["tensors"]["unet"] > 10
    assert hub.cuts == 0


def test_a_download_that_never_ends_is_an_error_and_the_next_goes_on(
    hub: Hub, fetch: Callable[..., Any]
) -> None:
    hub.cut, hub.cuts = "unet/diffusion_pytorch_model.safetensors", 10**9
    failed = fetch()["error"]
    assert failed.startswith("org/tiny: the download failed (")
    assert failed.endswith("run the same command again, it goes on from there")
    assert "error" in fetch(local_files_only=True)
    hub.cuts = 0
    hub.requests.clear()
    assert fetch()["tensors"]["unet"] > 10
    assert "model_index.json" not in hub.fetched()


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(
    hub: Hub, fetch: Callable[..., Any], tmp_path: Path
) -> None:
    hub.cut, hub.cuts = "unet/diffusion_pytorch_model.safetensors", 10**9
    with start(hub, PROGRAM) as process:
        assert process.stdin
        process.stdin.write(json.dumps({"source": "org/tiny", "cache_dir": str(tmp_path / "home")}) + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while hub.cut not in hub.fetched() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert hub.cut in hub.fetched()
    hub.cuts = 0
    assert "error" in fetch(local_files_only=True)
    assert fetch()["tensors"]["unet"] > 10


def test_an_unsupported_model_costs_no_download(
    hub: Hub, fetch: Callable[..., Any], tiny_sd: Path, tmp_path: Path
) -> None:
    flux = copied(tiny_sd, tmp_path / "flux")
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    pickles = copied(tiny_sd, tmp_path / "pickles")
    weights = pickles / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    folders = {"org/flux": flux, "org/pickles": pickles, "org/lora": lora}
    hub.repos = {name: Repo({"main": folder}) for name, folder in folders.items()}
    errors = {name: fetch(name)["error"] for name in folders}
    assert (
        "FluxPipeline is not supported; sdfast runs the U-Net family: StableDiffusionP" in errors["org/flux"]
    )
    assert "a pickle only (unet/diffusion_pytorch_model.bin)" in errors["org/pickles"]
    assert "no model_index.json" in errors["org/lora"]
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.fetched())


def test_a_folder_of_the_same_name_wins(
    hub: Hub, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_sd, tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    found = resolve("org/tiny")
    assert found.folder == folder.resolve() and found.revision is None


LORAS = """
import json, sys
from sdfast.errors import CheckpointError
from sdfast.export import hub
for line in sys.stdin:
    asked = json.loads(line)
    choose = lambda names: next(name for name in sorted(names) if name.endswith("lora.safetensors"))
    try:
        revision = asked.get("revision")
        path, name, commit = hub.download_file(asked["source"], choose, revision=revision, progress=len)
        answer = {"content": path.read_text(), "name": name, "commit": commit}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    """As LoRAs are: the one that is chosen and no other, at the revision that is asked for, offline too."""
    for name in ("old", "new"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "lora.safetensors").write_text(name)
        (tmp_path / name / "other.safetensors").write_text("other")
    hub.repos["org/lora"] = Repo({"main": tmp_path / "new", "v1": tmp_path / "old"})
    home = tmp_path / "home"
    with start(hub, IMPATIENT + LORAS, HF_HOME=str(home)) as process:
        new = ask(process, "org/lora", home)
        old = ask(process, "org/lora", home, revision="v1")
        none, no_revision = ask(process, "org/none", home), ask(process, "org/lora", home, revision="v9")
        process.terminate()
    assert new == {"content": "new", "name": "deep/lora.safetensors", "commit": commit_of(tmp_path / "new")}
    assert old == {"content": "old", "name": "deep/lora.safetensors", "commit": commit_of(tmp_path / "old")}
    assert hub.fetched() == {"deep/lora.safetensors"}
    assert "org/none: no such model" in none["error"]
    assert "has no revision 'v9'" in no_revision["error"]
    with start(hub, IMPATIENT + LORAS, HF_HOME=str(home), HF_HUB_OFFLINE="1") as process:
        assert ask(process, "org/lora", home) == new
        process.terminate()


CONTROLNETS = """
import json, sys
from sdfast.errors import CheckpointError
from sdfast.export import hub
for line in sys.stdin:
    asked = json.loads(line)
    try:
        folder, commit = hub.download_controlnet(asked["source"], variant=asked.get("variant"), progress=len)
        answer = {"commit": commit, "files": sorted(path.name for path in folder.iterdir())}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def test_a_controlnet_comes_whole_and_nothing_else(hub: Hub, tiny_controlnet: Path, tmp_path: Path) -> None:
    """Its config and the weights that are asked for: no pickle, no script, no other precision."""
    folder, home = copied(tiny_controlnet, tmp_path / "repo"), tmp_path / "home"
    weights = "diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.bin", "canny.py", "diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(folder / weights, folder / name)
    unsafe = copied(tiny_controlnet, tmp_path / "unsafe")
    (unsafe / weights).rename(unsafe / "diffusion_pytorch_model.bin")
    hub.repos |= {"org/canny": Repo({"main": folder}), "org/unsafe": Repo({"main": unsafe})}
    with start(hub, IMPATIENT + CONTROLNETS, HF_HOME=str(home)) as process:
        found = ask(process, "org/canny", home)
        assert hub.fetched() == {"config.json", weights}
        half = ask(process, "org/canny", home, variant="fp16")
        errors = [ask(process, name, home)["error"] for name in ("org/unsafe", "org/tiny")]
        process.terminate()
    assert found == {"commit": commit_of(folder), "files": ["config.json", weights]}
    assert half["files"] == ["config.json", "diffusion_pytorch_model.fp16.safetensors", weights]
    assert "a pickle only (diffusion_pytorch_model.bin)" in errors[0]
    assert errors[1].startswith("org/tiny: no config.json, so not a ControlNet")


VAES = """
import json, sys
from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import resolve
from sdfast.export.recipe import VAESetting
from sdfast.export.vae import with_vae
for line in sys.stdin:
    asked = json.loads(line)
    del asked["cache_dir"]
    checkpoint = resolve(asked.pop("checkpoint"))
    try:
        vae = with_vae(checkpoint, VAESetting(**asked), len).vae
        answer = {"record": str(vae.record()), "class": vae.component.class_name}
        answer["tensors"] = len(vae.state_dict())
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def test_a_vae_comes_from_its_own_repository_or_out_of_a_checkpoints(
    hub: Hub, tiny_sd: Path, tmp_path: Path
) -> None:
    """Its config and weights, and nothing else that lies there."""
    home, weights = tmp_path / "home", "diffusion_pytorch_model.safetensors"
    tiny, whole = build_tiny_vae(tmp_path / "tiny"), copied(tiny_sd, tmp_path / "whole")
    for name in ("diffusion_pytorch_model.bin", "taesd_decoder.safetensors", "taesd.py"):
        shutil.copy(tiny / weights, tiny / name)
    hub.repos |= {"org/taesd": Repo({"main": tiny}), "org/whole": Repo({"main": whole})}
    call = {"checkpoint": str(tiny_sd)}
    with start(hub, IMPATIENT + VAES, HF_HOME=str(home)) as process:
        own = ask(process, "org/taesd", home, **call)
        assert hub.fetched() == {"config.json", weights}
        hub.requests.clear()
        part = ask(process, "org/whole", home, **call)
        assert hub.fetched() == {"model_index.json", "vae/config.json", f"vae/{weights}"}
        none = ask(process, "org/whole", home, **call, variant="fp16")
        process.terminate()
    assert own["record"] == f"org/taesd at {commit_of(tiny)[:8]}" and own["class"] == "AutoencoderTiny"
    assert part["record"] == f"org/whole at {commit_of(whole)[:8]}" and part["class"] == "AutoencoderKL"
    assert min(own["tensors"], part["tensors"]) > 10
    assert "no weights of the variant 'fp16'" in none["error"]


IP_ADAPTERS = """
import json, sys
from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import resolve
from sdfast.export.ip_adapter import with_ip_adapters
from sdfast.export.recipe import Recipe
for line in sys.stdin:
    asked = json.loads(line)
    del asked["cache_dir"]
    checkpoint, encoder = resolve(asked.pop("checkpoint")), asked.pop("encoder", None)
    try:
        settings = Recipe.make(ip_adapters=[asked]).ip_adapters
        made = with_ip_adapters(checkpoint, settings, encoder, len)
        [adapter] = made.ip_adapters
        answer = {"adapter": str(adapter.record()), "encoder": str(made.image_encoder.record())}
        answer["tensors"] = len(adapter.state_dict()), len(made.image_encoder.state_dict())
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def test_an_ip_adapter_comes_with_its_image_encoder(hub: Hub, tiny_sd: Path, tmp_path: Path) -> None:
    """That beside it, or that in a folder which is named; nothing else of the repository."""
    folder, home = tmp_path / "repo", tmp_path / "home"
    build_ip_adapter(folder / "models" / "plain.safetensors", tiny_sd)
    shutil.copytree(folder / "models", folder / "others")
    (folder / "others" / "image_encoder").rename(folder / "seen_with")
    for name in ("models/plain.bin", "models/image_encoder/pytorch_model.bin", "models/image_encoder/a.py"):
        (folder / name).write_bytes(b"x")
    hub.repos |= {"org/ip": Repo({"main": folder})}
    call = {"checkpoint": str(tiny_sd), "subfolder": "models", "weight_name": "plain.safetensors"}
    with start(hub, IMPATIENT + IP_ADAPTERS, HF_HOME=str(home)) as process:
        found = ask(process, "org/ip", home, **call)
        files = ("plain.safetensors", "image_encoder/config.json", "image_encoder/model.safetensors")
        assert hub.fetched() == {f"models/{name}" for name in files}
        other = ask(process, "org/ip", home, **{**call, "subfolder": "others"}, encoder="seen_with")
        none = ask(process, "org/ip", home, **{**call, "subfolder": "others"})
        process.terminate()
    commit = commit_of(folder)[:8]
    assert found["adapter"] == f"org/ip/models/plain.safetensors at {commit}, plain"
    assert found["encoder"] == f"org/ip/models/image_encoder at {commit}"
    assert min(found["tensors"]) > 4
    assert other["encoder"] == f"org/ip/seen_with at {commit}" and other["tensors"] == found["tensors"]
    assert "org/ip/others/image_encoder: no config.json, so not an image encoder's folder" in none["error"]

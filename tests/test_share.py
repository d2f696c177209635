"""Shared folders, their model cards, and models on the hub, of which a fake stands in."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import anystep
from anystep import Model, checkpoint, cli
from anystep.card import card, metadata
from anystep.errors import UserError
from anystep.interop.hub import push
from anystep.networks import build_model
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.sampling import sample
from anystep.share import (
    from_pretrained,
    portable,
    push_to_hub,
    read_source,
    save_pretrained,
)
from anystep.spec import ModelSpec, VAESpec
from conftest import SMALL, small_net
from test_cli import SMALL as TINY
from test_cli import pictures, refused

hub = pytest.importorskip("huggingface_hub")
FOLDER = ["README.md", "config.json", "grid.png", "model.json", "model.safetensors"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on colour pictures without classes, three steps long, and judged."""
    place = tmp_path_factory.mktemp("private")
    data = pictures(place / "data", n=24, classes=("",))
    args = ["train", "folder", "--data.path", data, "--data.size", "8", "12", *TINY]
    args += ["--network.patch", "4", "--steps", "3", "--out", place / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert cli.main([str(a) for a in args]) == 0
        args = ["eval", place / "run", "--steps", "1", "4", "--n", "20"]
        assert cli.main([str(a) for a in args]) == 0
    return place / "run"


@pytest.fixture
def run(capsys):
    """Run a command; returns its exit code, stdout and stderr."""

    def call(*args):
        code = cli.main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_model(kind="dit", objective=None, num_classes=4, **spec):
    net, shape = small_net(kind, num_classes)
    data = "[-1, 1]" if kind == "dit" else "raw"
    base = ModelSpec(shape=shape, num_classes=num_classes, data=data, **spec)
    model = build_model(net.config, (objective or Shortcut()).spec(base)).eval()
    model.net.load_state_dict(net.state_dict())
    return model


def drawn(model, steps=32, n=6):
    x0 = torch.randn(n, *model.spec.shape, generator=torch.Generator().manual_seed(0))
    cond = torch.arange(n) % model.spec.num_classes if model.spec.num_classes else None
    return sample(model, x0, steps=steps, cond=cond)


def texts(folder):
    return {p: p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".md")}


class TestFolder:
    def test_it_is_the_same_model(self, run_folder, here):
        assert save_pretrained(run_folder, "shared") == here / "shared"
        assert sorted(p.name for p in (here / "shared").iterdir()) == sorted(
            [*FOLDER, "quality.json"]
        )
        ours, theirs = checkpoint.load_model(run_folder), from_pretrained("shared")
        difference = (drawn(ours) - drawn(theirs)).abs().max().item()
        print(f"shared against own: {difference}")
        assert ours.spec == theirs.spec and difference == 0
        again = save_pretrained("shared", "again", name="shared")
        for name in [*FOLDER, "quality.json"]:  # sharing what was shared loses nothing
            assert (again / name).read_bytes() == (here / "shared" / name).read_bytes(), name

    def test_no_path_of_this_machine_is_in_it(self, run_folder, here):
        for path, text in texts(save_pretrained(run_folder, "shared")).items():
            assert str(here) not in text and str(run_folder.parent) not in text, path
            assert "/home" not in text and "/tmp" not in text, path
        assert portable({"a": ["/x/y", "x/y", 1, None], "b": {"c": "/z"}}) == {
            "a": ["y", "x/y", 1, None],
            "b": {"c": "z"},
        }

    def test_its_config_trains_the_model_again(self, run, run_folder, here):
        save_pretrained(run_folder, "shared")
        code, out, _ = run("train", "shared/config.json", "--dry-run", "--data.path", "mine")
        ours = json.loads((run_folder / "config.json").read_text())
        assert code == 0 and json.loads(out)["objective"] == ours["objective"]
        assert json.loads(out)["steps"] == 3

    def test_half_precision(self, run_folder, here):
        whole = save_pretrained(run_folder, "whole") / "model.safetensors"
        half = save_pretrained(run_folder, "half", half=True) / "model.safetensors"
        assert {v.dtype for v in load_file(half).values()} == {torch.float16}
        share = half.stat().st_size / whole.stat().st_size
        models = [from_pretrained(name) for name in ("whole", "half")]
        assert {v.dtype for v in models[1].net.state_dict().values()} == {torch.float32}
        a, b = (drawn(model, 32) for model in models)
        error = (a - b).abs().max().item() / a.std().item()
        print(f"half: {share:.3f} of the bytes, samples differ by {error:.1e} of their deviation")
        assert share < 0.6 and 0 < error < 5e-3

    def test_weights_too_large_for_half(self, here):
        model = small_model()
        model.net.output.bias.data[0] = 1e6
        with pytest.raises(UserError, match=r"output\.bias does not fit half precision"):
            save_pretrained(model, "half", half=True)
        assert not (here / "half").exists()

    @pytest.mark.parametrize("kind", SMALL)
    def test_a_model_that_is_not_on_the_disk(self, here, kind):
        model = small_model(kind)
        save_pretrained(model, "shared")
        assert torch.equal(drawn(model), drawn(from_pretrained("shared")))
        assert sorted(p.name for p in (here / "shared").iterdir()) == sorted(
            set(FOLDER) - {"config.json"}
        )
        other = model.net.config.build(model.spec.shape, 4)  # of M = 128, not the spec's 32
        other.load_state_dict(model.net.state_dict())
        with pytest.raises(UserError, match=r"build\(spec.shape, spec.num_classes, spec.finest\)"):
            save_pretrained(Model(other, model.spec), "other")
        model.net.config = None
        with pytest.raises(UserError, match="does not know its NetworkConfig"):
            save_pretrained(model, "other")

    def test_nothing_is_written_over(self, run, run_folder, here):
        (here / "mine").mkdir()
        (here / "mine" / "thesis.tex").touch()
        refused(run("export", "hub", run_folder, "mine"), "mine is not empty")
        refused(run("export", "hub", run_folder, "mine/thesis.tex"), "not empty")
        refused(run("export", "hub", here / "none", "new"), "holds no model")
        refused(run("export", "hub", run_folder, "new", "--private"), "--push")
        refused(run("export", "hub", run_folder, "new", "--vae", "x"), "no latent model")
        assert [p.name for p in here.iterdir()] == ["mine"]

    def test_the_command(self, run, run_folder, here):
        code, out, _ = run("export", "hub", run_folder, "shared", "--half")
        assert code == 0 and out == "shared\nnext: anystep sample shared --steps 4\n"
        assert run("sample", "shared", "--steps", "3", "--n", "4", "--out", "s.png")[0] == 0
        about = json.loads(run("info", "shared")[1])
        assert about["training"]["step"] == 3 and about["spec"]["shape"] == [3, 8, 12]
        refused(run("export", "hbu", run_folder, "new"), "did you mean 'hub'?")
        refused(run("export", "--half"), "name a format", "diffusers|hub")
        code, out, _ = run("export", "--help")
        assert code == 0 and "  hub " in out and "  diffusers " in out


class TestCard:
    def test_it_says_what_is_known(self, run_folder, here):
        text = (save_pretrained(run_folder, "shared") / "README.md").read_text()
        training = checkpoint.read_info(checkpoint.find_model(run_folder))["training"]
        config = training["config"]
        parameters = sum(p.numel() for p in checkpoint.load_model(run_folder).parameters())
        for fact in (
            "# shared\n",
            "3x8x12 with no classes, trained by shortcut",
            "path `data`",
            f"digest `{training['data']}`",
            f"bootstrap_share {config['objective']['bootstrap_share']}",
            "3 of 8 examples, seed 0",
            f"{parameters:,} parameters",
            f"{training['forwards']:,} forward-equivalents",
            "anystep sample shared --steps 4",
            "(grid.png)",
        ):
            assert fact in text, fact
        rows = [line for line in text.splitlines() if re.match(r"\| shared \| [14] \|", line)]
        wanted = json.loads((run_folder / "quality.json").read_text())["rows"][-1]["scores"]
        assert len(rows) == 2 and f"| {wanted['frechet']:.3f} |" in rows[1]
        picture = Image.open(here / "shared" / "grid.png")
        assert picture.width > 100 and len(picture.getcolors(10**6)) > 10

    def test_the_hub_reads_its_metadata(self, run_folder, here):
        data = hub.ModelCard.load(save_pretrained(run_folder, "shared") / "README.md").data
        assert data.library_name == "anystep" and "shortcut" in data.tags
        assert data.pipeline_tag == "unconditional-image-generation" and data.datasets is None
        config = {"data": {"name": "hub", "path": "owner/data: 1"}}
        (here / "card.md").write_text(metadata(small_model().spec, config) + "\n# x\n")
        assert hub.ModelCard.load(here / "card.md").data.datasets == ["owner/data: 1"]

    @pytest.mark.parametrize("num_classes", [0, 4])
    def test_its_python_runs(self, here, num_classes):
        save_pretrained(small_model(num_classes=num_classes), "shared")
        (code,) = re.findall(r"```python\n(.*?)```", (here / "shared/README.md").read_text(), re.S)
        names = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["x1"].shape == (16, 3, 4, 6)

    def test_guidance_steps_and_vae_of_other_models(self):
        def text(*args, **options):
            model = small_model(*args, **options)
            return card("x", model, read_source(model).info)

        baked = text(
            objective=Shortcut(guidance=1.5), vae=VAESpec("owner/vae", None, "", "abc", 0.5)
        )
        assert "1.5 is baked into step sizes 1/1, 1/2, 1/4, 1/8, 1/16;" in baked
        assert "trained step sizes 1/1, 1/2, 1/4, 1/8, 1/16, 1/32 and less" in baked
        assert "it may be applied in 32 steps or more" in baked
        assert "`owner/vae` (weights `abc`, scale 0.5" in baked and "recorded(model" in baked
        flow = text(objective=FlowMatching())
        assert "**steps**: 32 or more; the network is not told the step" in flow
        assert "--steps 32" in flow and "it may be applied at any step count" in flow
        free = text(num_classes=0)
        assert "none: there are no classes" in free and "cond=" not in free

    def test_a_report_of_older_weights_is_left_out(self, run_folder, here):
        copy = shutil.copytree(run_folder, here / "run")
        os.utime(copy / "quality.json", (1, 1))
        with pytest.warns(UserWarning, match="older than the model"):
            shared = save_pretrained(copy, "shared")
        assert "## Quality" not in (shared / "README.md").read_text()

    def test_a_report_of_several_models(self, run_folder, here):
        report = json.loads((run_folder / "quality.json").read_text())
        rows = report["rows"]
        others = [row | {"model": "runs/b", "scores": {"frechet": 9.25}} for row in rows[1:]]
        checkpoint.write_json(here / "quality.json", report | {"rows": rows + others})
        shared = save_pretrained(run_folder, "shared", quality=here)
        text = (shared / "README.md").read_text()
        assert "| shared | 4 |" in text and "9.250" not in text and "runs/b" not in text
        checkpoint.write_json(here / "quality.json", report | {"rows": others})
        with pytest.raises(UserError, match=r"says nothing of .*run \(it judges runs/b\)"):
            save_pretrained(run_folder, "other", quality=here)
        checkpoint.write_json(here / "quality.json", [])
        with pytest.raises(UserError, match="no report of anystep eval"):
            save_pretrained(run_folder, "other", quality=here)
        with pytest.raises(UserError, match="is missing"):
            save_pretrained(run_folder, "other", quality=here / "none")


class TestLatents:
    @pytest.fixture
    def latent(self, tmp_path):
        from anystep.interop.vae import VAE
        from test_latents import save_vae

        folder = save_vae(tmp_path / "vae", scaling_factor=0.4, shift_factor=0.25)
        spec = ModelSpec(shape=(4, 8, 8), num_classes=4, data="raw", vae=VAE(str(folder)).spec)
        return build_model(SMALL["dit"][0], Shortcut().spec(spec)).eval(), folder

    def test_a_vae_of_this_machine_goes_along(self, run, latent, here):
        model, folder = latent
        with pytest.raises(UserError, match="say where it lies with --vae"):
            moved = folder.rename(here / "moved")
            save_pretrained(model, "shared")
        save_pretrained(model, "shared", vae=moved)
        shutil.rmtree(moved)
        (here / "far").mkdir()
        (here / "shared").rename(here / "far" / "away")
        for path, text in texts(here / "far").items():
            assert str(here) not in text, path
        theirs = from_pretrained(here / "far" / "away")
        assert theirs.spec == model.spec
        assert run("sample", "far/away", "--n", "4", "--out", "s.png")[0] == 0
        save_pretrained("far/away", "again")
        assert from_pretrained("again").spec.vae.name == str(here / "again")

    def test_a_vae_of_the_hub_is_named(self, here):
        vae = VAESpec("owner/vae", "main", "vae", "abc", 0.5)
        model = small_model(vae=vae)
        with pytest.warns(UserWarning, match="latents are shown as they are"):
            save_pretrained(model, "shared")
        assert vars(from_pretrained("shared").spec.vae) == vars(vae)
        assert not (here / "shared" / "vae").exists()


class FakeHub:
    """Stands in for huggingface_hub: repositories are folders, and calls are written down."""

    def __init__(self, patch):
        self.repos, self.calls = {}, []
        for name in ("snapshot_download", "create_repo", "upload_folder"):
            patch.setattr(hub, name, getattr(self, name))

    def snapshot_download(self, repo_id, **options):
        self.calls.append(("snapshot_download", repo_id, options))
        return str(self.repos[repo_id])

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id, options))
        self.files = {p.name: p.read_bytes() for p in folder_path.iterdir()}


WANTED = ["model.json", "model.safetensors", "config.json", "quality.json", "vae/*"]


class TestHub:
    @pytest.fixture
    def fake(self, monkeypatch):
        return FakeHub(monkeypatch)

    def test_a_name_will_do_wherever_a_model_is_asked_for(self, run, run_folder, here, fake):
        fake.repos["me/it"] = save_pretrained(run_folder, here / "cache" / "it")
        assert from_pretrained("me/it").spec == checkpoint.load_model(run_folder).spec
        anystep.load_model("me/it@v1")
        from_pretrained("me/it", revision="refs/pr/1")
        assert fake.calls == [
            ("snapshot_download", "me/it", {"revision": revision, "allow_patterns": WANTED})
            for revision in (None, "v1", "refs/pr/1")
        ]
        assert run("sample", "me/it", "--n", "4", "--out", "s.png")[0] == 0
        assert json.loads(run("info", "me/it@main")[1])["training"]["step"] == 3
        assert run("pairs", "me/it", "--out", "pairs", "--n", "4", "--steps", "2")[0] == 0
        assert run("export", "hub", "me/it", "mine")[0] == 0
        assert "| mine | 4 |" in (here / "mine" / "README.md").read_text()
        refused(run("eval", "me/it"), "me/it is no folder to write to", "--out")
        assert not (here / "me").exists()

    def test_what_is_here_wins_and_a_slip_is_not_sent(self, run, run_folder, here, fake):
        save_pretrained(run_folder, here / "runs" / "digits")
        from_pretrained("runs/digits")
        (here / "runs" / "digits").rename(here / "runs" / "digits@2")
        from_pretrained("runs/digits@2")
        for path in ("runs/digist", "../runs/x", "runs", "a/b/c", "/a/b", "./runs/x"):
            refused(run("sample", path), f"{path.removeprefix('./')} holds no model")
        assert not fake.calls

    def test_pushing(self, run, run_folder, here, fake):
        code, out, _ = run("export", "hub", run_folder, "out", "--push", "me/it", "--private")
        address = "https://huggingface.co/me/it"
        assert code == 0 and address in out and "next: anystep sample me/it" in out
        assert push_to_hub(small_model(), "me/other") == address.replace("it", "other")
        message = {"commit_message": "Upload with anystep"}
        assert fake.calls == [
            ("create_repo", "me/it", {"private": True, "exist_ok": True}),
            ("upload_folder", "me/it", message),
            ("create_repo", "me/other", {"private": None, "exist_ok": True}),
            ("upload_folder", "me/other", message),
        ]
        assert sorted(fake.files) == sorted(set(FOLDER) - {"config.json"})
        assert b"from_pretrained('me/other')" in fake.files["README.md"]
        for name in ("it", "me/it@main", "me/i t", "a/b/c"):
            refused(run("export", "hub", run_folder, "new", "--push", name), "write owner/name")
        assert len(fake.calls) == 4 and not (here / "new").exists()

    def test_failures_are_one_line(self, run, here, fake, monkeypatch):
        errors = hub.errors
        for kind, text, line in (
            (errors.RepositoryNotFoundError, "a\nb", "there is no such model"),
            (errors.GatedRepoError, "a\nb", "ask for access"),
            (errors.RevisionNotFoundError, "a\nb", "no such revision"),
            (errors.LocalEntryNotFoundError, "a\nb", "not in the cache"),
            (errors.OfflineModeIsEnabled, "a\nb", "HF_HUB_OFFLINE"),
            (ConnectionResetError, "cut\noff", "cut off"),
            (RuntimeError, "", "RuntimeError"),
        ):

            def fail(*_, kind=kind, text=text, **__):
                raise kind.__new__(kind, text)  # without the response that the hub's own want

            monkeypatch.setattr(hub, "snapshot_download", fail)
            monkeypatch.setattr(hub, "create_repo", fail)
            refused(run("sample", "me/it"), "me/it is no folder here", line)
            with pytest.raises(UserError, match="cannot push to me/it: ") as caught:
                push(here, "me/it")
            assert line in str(caught.value) and "\n" not in str(caught.value)

    def test_without_huggingface_hub(self, run, here, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        refused(run("sample", "me/it"), "pip install 'anystep[share]'")

    def test_offline_the_cache_is_read(self, run, run_folder, here, monkeypatch):
        """Through huggingface_hub's own code, with HF_HUB_OFFLINE set."""
        assert hub.constants.is_offline_mode()
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(here / "cache"))
        refused(run("sample", "me/it"), "me/it is no folder here", "not in the cache")
        commit, repo = "0123456789abcdef" * 2 + "01234567", here / "cache" / "models--me--it"
        save_pretrained(run_folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        wanted = drawn(checkpoint.load_model(run_folder))
        for name in ("me/it", "me/it@main", f"me/it@{commit}"):
            assert torch.equal(drawn(from_pretrained(name)), wanted)
        refused(run("sample", "me/it@v2"), "not in the cache")

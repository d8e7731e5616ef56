import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.hub import resolve_model

NAME, COMMIT = "black-forest-labs/FLUX.1-Kontext-dev", "f9c1a1f3bdb4d0a1d4f0a3ac2fd2e9d1f2d34c55"


@pytest.fixture
def cache(tmp_path):
    """A cache as huggingface_hub lays it out: blobs, and snapshots of links to them."""
    repository = tmp_path / "cache" / "models--black-forest-labs--FLUX.1-Kontext-dev"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot / "transformer"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot / "transformer" / "config.json").symlink_to("../../../blobs/abc")
    return tmp_path / "cache"


def test_local_folder(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_local_folder_goes_before_a_repository(cache, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / resolve_model(NAME, cache_dir=cache)).samefile(tmp_path / NAME)


def test_repository_in_the_cache(cache):
    folder = resolve_model(NAME, cache_dir=cache)
    assert folder == cache / "models--black-forest-labs--FLUX.1-Kontext-dev" / "snapshots" / COMMIT
    assert (folder / "transformer" / "config.json").read_text() == "{}"


def test_default_cache(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert resolve_model(NAME).name == COMMIT


def test_what_is_nowhere_is_not_downloaded(cache):
    with pytest.raises(UserError) as error:
        resolve_model("someone/else", cache_dir=cache)
    assert str(error.value) == (
        f"'someone/else': no such folder, and not in the Hugging Face cache {cache}; download it with: "
        f"hf download someone/else --exclude 'flux1-*.safetensors' --cache-dir {cache}"
    )


@pytest.mark.parametrize("name", ["nothing", "/absent/folder", "a/b/c", "bad name/x", "../up"])
def test_neither_folder_nor_repository_id(name, cache):
    with pytest.raises(UserError, match="no such folder, and not a Hugging Face repository id"):
        resolve_model(name, cache_dir=cache)

"""Pictures at an fsspec URL: fsspec's memory, and a real client against a server that speaks S3."""

from __future__ import annotations

import os
import shutil
import time
from uuid import uuid4

import pytest
from emoloop.domain import EmotionTarget, UserError
from emoloop.events import ImageGenerated, RunStarted
from emoloop.settings import Settings, TraceSettings
from emoloop.traces.blobs import RemoteBlobStore
from emoloop.traces.store import open_store
from PIL import Image


@pytest.fixture(scope="session")
def s3():
    """URL of a bucket on a server of our own, on a free port; skipped without the packages."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        import s3fs

        s3fs.S3FileSystem().mkdir("pictures")
        yield "s3://pictures"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    return f"{request.getfixturevalue('s3') if request.param == 's3' else 'memory://pictures'}/{uuid4().hex}"


def test_a_blob_is_at_the_url_and_found_from_another_machine(url, tmp_path):
    here, there = (RemoteBlobStore(tmp_path / name, url) for name in ("here", "there"))
    picture = Image.linear_gradient("L").convert("RGB")
    sha256 = here.put_image(picture)
    assert here.put_image(picture) == sha256
    assert there.get_image(sha256).tobytes() == picture.tobytes()
    assert there.path(sha256).read_bytes() == here.path(sha256).read_bytes()
    shutil.rmtree(tmp_path / "here")
    assert here.path(sha256).is_file()
    with pytest.raises(FileNotFoundError):
        here.get_bytes("0" * 64)
    assert not here.path("0" * 64).exists()


def test_damage_is_noticed_and_a_copy_is_mended(url, tmp_path):
    blobs = RemoteBlobStore(tmp_path / "a", url)
    sha256 = blobs.put_bytes(b"hello", "bin")
    blobs.path(sha256, "bin").write_bytes(b"jello")
    assert blobs.get_bytes(sha256, "bin") == b"hello"
    assert blobs.path(sha256, "bin").read_bytes() == b"hello"
    blobs._remote.pipe_file(blobs._at(sha256, "bin"), b"jello")
    blobs.path(sha256, "bin").unlink()
    with pytest.raises(OSError, match="damaged"):
        blobs.get_bytes(sha256, "bin")


def test_what_was_stored_again_stays(url, tmp_path):
    blobs = RemoteBlobStore(tmp_path / "a", url)
    sha256 = blobs.put_bytes(b"hello", "bin")
    assert blobs.remove(sha256, unless_claimed_after=time.time() - 60) == 0
    assert blobs.get_bytes(sha256, "bin") == b"hello"
    assert blobs.remove(sha256, unless_claimed_after=time.time() + 60) == 1
    with pytest.raises(FileNotFoundError):
        blobs.get_bytes(sha256, "bin")


def test_the_log_names_pictures_that_lie_elsewhere(url, tmp_path):
    traces = TraceSettings(blobs_url=url)
    with open_store(Settings(home=tmp_path / "home", traces=traces)) as store:
        sha256 = store.blobs.put_image(Image.new("RGB", (16, 16), "red"))
        store.append(
            RunStarted(run_id="one", prompt="p", target=EmotionTarget(valence=1.0), seed=1),
            ImageGenerated(run_id="one", sha256=sha256, prompt="p", seed=1, model="m", height=16, width=16),
        )
    shutil.rmtree(tmp_path / "home" / "blobs")
    with open_store(Settings(home=tmp_path / "home", traces=traces)) as store:
        [candidate] = store.run("one").rounds[0].candidates
        assert candidate.image.getpixel((0, 0)) == (255, 0, 0)
        assert store.remove("one") == (2, 1)


class Refusing:
    def pipe(self, files):
        raise RuntimeError("no route to the store")


def test_a_store_that_refuses_is_a_disk_that_refuses(tmp_path):
    blobs = RemoteBlobStore(tmp_path / "a", "memory://refusing")
    blobs._remote = Refusing()
    with pytest.raises(OSError, match="no route to the store"):
        blobs.put_bytes(b"hello", "bin")
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("wrong", ["nosuch://me:secret@bucket/folder"])
def test_a_wrong_url_is_one_line_without_its_password(tmp_path, wrong):
    with pytest.raises(UserError, match=r"traces\.blobs_url") as error:
        RemoteBlobStore(tmp_path, wrong)
    assert "secret" not in str(error.value)

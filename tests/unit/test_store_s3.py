"""The store's promises over HTTP, with S3's conditional puts, on a server of our own."""

import pytest
from storage_faults import BLOB, elsewhere, held

from diki_ray.errors import FencedError, LeaseHeldError, StorageError
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import RunStore

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


class TestS3:
    """The same promises over HTTP, with S3's conditional puts."""

    @pytest.fixture(scope="class")
    def server(self):
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield "http://{}:{}".format(*server.get_host_and_port())
        server.stop()

    @pytest.fixture
    def storage(self, server, monkeypatch, request) -> str:
        import boto3

        for name, value in {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{abs(hash(request.node.name)) % 10**8}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}/some/prefix"

    def test_a_runs_whole_life(self, storage, tmp_path):
        store = RunStore.open(storage, "run")
        epoch = store.acquire(elsewhere())
        entry = store.commit_module(epoch, "k", "task", BLOB * 300, {"num_classes": 3})
        store.save_checkpoint(epoch, "k2", 10, BLOB)
        store.put_document(epoch, "results.json", {"average": 0.5})
        again = RunStore.open(storage, "run")
        assert again.modules() == (entry,)
        assert again.read_module(entry.digest) == BLOB * 300
        assert again.load_checkpoint("k2") == (10, BLOB, {})
        assert RunStore.runs(storage) == ("run",)
        with pytest.raises(LeaseHeldError):
            again.acquire(elsewhere())
        new = again.acquire(elsewhere(), take_over=True)
        with pytest.raises(FencedError):
            store.commit_module(epoch, "late", "late", b"late")
        again.remove_task(new, "task")
        again.compact(new)
        assert again.purge(new).digests == (entry.digest,)
        assert again.verify() == ()
        again.export(str(tmp_path / "copy.tar"))
        assert RunStore.import_(str(tmp_path / "disk"), "run", str(tmp_path / "copy.tar")).state == again.state

    def test_create_only_leaves_what_is_there(self, storage):
        objects = Objects.open(storage)
        assert objects.put("x", b"first", create_only=True)
        assert not objects.put("x", b"second", create_only=True)
        assert objects.get("x") == b"first"
        assert objects.get("y") is None

    def test_a_missing_bucket_is_said(self, storage):
        with pytest.raises(StorageError, match="no-such-bucket"):
            held(Objects.open("s3://no-such-bucket/x"))

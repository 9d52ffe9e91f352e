"""What the local Hub holds: the files of a repository at each of its commits, and its branches."""

import hashlib

# The Hub stores these as LFS files (by the .gitattributes file that every new repository gets), and anything above
# 10 MB. Everything else travels as base64 text inside the commit.
LFS_SUFFIXES = (".arrow", ".bin", ".ckpt", ".npz", ".onnx", ".parquet", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
LFS_SIZE = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An error answer. `code` becomes `X-Error-Code`, by which the clients choose the class of their exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        super().__init__(message)
        self.status, self.fields = status, {"error": message, **fields}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Blob:
    """The content of one file, with the hashes by which git, LFS and the caches of the clients know it."""

    def __init__(self, path: str, data: bytes):
        self.data = data
        # Empty files are never LFS files: the client refuses to send them that way.
        self.is_lfs = len(data) > 0 and (path.endswith(LFS_SUFFIXES) or len(data) > LFS_SIZE)
        self.sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        self.stored = pointer if self.is_lfs else data  # what git itself stores
        self.git_oid = hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()
        self.etag = self.sha256 if self.is_lfs else self.git_oid

    def describe(self, path: str) -> dict:
        """The file as an entry of a tree listing."""
        entry = {"type": "file", "oid": self.git_oid, "size": len(self.data), "path": path}
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.stored)}
        return entry | {"lfs": lfs} if self.is_lfs else entry


class Repo:
    """A model or dataset repository: who may read it, its commits (hash -> all files), newest last, and its branches."""

    def __init__(self, repo_type: str, repo_id: str):
        self.type, self.id, self.private, self.gated = repo_type, repo_id, False, False
        self.owner = repo_id.split("/")[0]
        self.readers = {self.owner}  # who has access if it is private or gated; a test may add names
        self.page = f"{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        self.commits: dict[str, dict[str, Blob]] = {}
        self.titles: dict[str, str] = {}  # of the commits that clients made
        self.branches: dict[str, str] = {}
        self.commit({})

    def commit(self, files: dict[str, Blob], branch: str = "main", title: str | None = None) -> str:
        state = [(path, blob.etag) for path, blob in sorted(files.items())]
        oid = hashlib.sha1(repr((self.type, self.id, len(self.commits), state)).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        if title is not None:
            self.titles[oid] = title
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """The commit hash and the files of a revision: a branch or the hash of a commit."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, dict(self.commits[oid])

    def tree(self, revision: str, folder: str = "", recursive: bool = True) -> list[dict]:
        """The entries below a folder: files and folders, of one level or of all."""
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict] = {}
        for path, blob in sorted(self.at(revision)[1].items()):
            parts = path.removeprefix(prefix).split("/")
            if not path.startswith(prefix):
                continue
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent}
            if recursive or len(parts) == 1:
                entries[path] = blob.describe(path)
        if folder and not entries:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        return list(entries.values())

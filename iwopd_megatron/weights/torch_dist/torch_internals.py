"""What is used of torch that its documentation does not promise, as read in torch 2.13.0.

torch.distributed.checkpoint.metadata: the classes that a checkpoint's `.metadata` is a pickle of.
`_StorageInfo` (torch.distributed.checkpoint.filesystem): where a chunk is, a file's `relative_path`
and `offset` and `length` in bytes; `FileSystemWriter` puts one for each chunk into
`Metadata.storage_data`. `METADATA_VERSION` is what it writes as `Metadata.version`.
The rest: a file of `torch.save` is a zip archive named "archive" whose first tensor's bytes are the
record "data/0" at a multiple of `ALIGN` bytes, after a header and its name and padding, before a
descriptor that begins with `DESCRIPTOR`.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_VERSION = "1.0.0"
FIRST_DATA = b"archive/data/0"
DESCRIPTOR = b"PK\x07\x08"
ALIGN = 64

__all__ = [
    "ALIGN",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "DESCRIPTOR",
    "FIRST_DATA",
    "METADATA_VERSION",
    "Metadata",
    "MetadataIndex",
    "StorageInfo",
    "TensorProperties",
    "TensorStorageMetadata",
]

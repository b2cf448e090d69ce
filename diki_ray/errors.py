"""Errors that people meet: each message is a sentence that says what is wrong and what to do."""


class UserError(Exception):
    """Something the user can put right (configuration, data, storage). Jobs print it and exit with code 2."""


class ConfigError(UserError):
    """A configuration that cannot be run; names the field, its value and what is allowed."""


class DataError(UserError):
    """A data set, shard or image that cannot be used; names the file and the sample's key where there is one."""


class StorageError(UserError):
    """Storage that cannot be read or written; names the path."""


class DiskFullError(StorageError):
    """No space left for a write; names the path and the free bytes. What was committed before stays valid."""


class LeaseHeldError(UserError):
    """Another driver holds the run; says which, since when, and how to take over."""


class FencedError(UserError):
    """This driver lost the run to a later one; its write was refused."""


class CorruptError(StorageError):
    """Stored bytes do not have the checksum they were committed with."""

"""What a source of data gives, for tests: every sample, or the sentence of a bad one."""

from internvl.config import SourceConfig
from internvl.data.records import Sample
from internvl.data.sources import open_source
from internvl.errors import BadSample


def opened(path, kind="chat", **keys):
    return open_source(SourceConfig(name="x", type=kind, annotations=path, **keys))


def samples(source):
    return list(source.samples(range(len(source))))


def good(source):
    found = samples(source)
    assert all(isinstance(sample, Sample) for sample in found), found
    return found


def says(source, number=0):
    (bad,) = source.samples([number])
    assert isinstance(bad, BadSample), bad
    return str(bad)

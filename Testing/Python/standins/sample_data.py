"""The module SampleData, for sources that are files on this computer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import slicer


@dataclass(frozen=True)
class Source:
    """What was registered."""

    category: str
    sampleName: str
    uris: tuple[str, ...]
    fileNames: tuple[str, ...]
    nodeNames: tuple[str, ...]
    thumbnailFileName: str | None
    checksums: tuple[str | None, ...]
    loadFileProperties: dict


class SampleDataLogic:
    """Registers and loads."""

    sources: ClassVar[list[Source]] = []

    @staticmethod
    def registerCustomSampleDataSource(
        category="Custom",
        sampleName=None,
        uris=None,
        fileNames=None,
        nodeNames=None,
        customDownloader=None,
        thumbnailFileName=None,
        loadFileType=None,
        loadFiles=None,
        loadFileProperties=None,
        checksums=None,
    ) -> None:
        """Offer a sample; customDownloader, loadFileType and loadFiles are not here."""
        if customDownloader or loadFileType or loadFiles:
            raise NotImplementedError("The stand-in of SampleData loads volumes only")
        uris = _tuple(uris)
        checksums = _tuple(checksums) or (None,) * len(uris)
        source = Source(category, sampleName, uris, _tuple(fileNames), _tuple(nodeNames), thumbnailFileName, checksums, loadFileProperties or {})
        if not len(source.uris) == len(source.fileNames) == len(source.nodeNames) == len(source.checksums):
            raise ValueError(f"'{sampleName}' has unequal numbers of uris, fileNames, nodeNames and checksums")
        SampleDataLogic.sources.append(source)

    def downloadSamples(self, sampleName: str) -> list[Any]:
        """Load all volumes of a sample, checked against their checksums."""
        source = next((source for source in self.sources if source.sampleName == sampleName), None)
        if source is None:
            raise RuntimeError(f"Sample data '{sampleName}' was not registered")
        return [_load(uri, name, checksum, source.loadFileProperties) for uri, name, checksum in zip(source.uris, source.nodeNames, source.checksums)]

    def downloadSample(self, sampleName: str) -> Any:
        """Load the first volume of a sample."""
        return self.downloadSamples(sampleName)[0]


def downloadSample(sampleName: str) -> Any:
    """See SampleDataLogic.downloadSample."""
    return SampleDataLogic().downloadSample(sampleName)


def downloadSamples(sampleName: str) -> list[Any]:
    """See SampleDataLogic.downloadSamples."""
    return SampleDataLogic().downloadSamples(sampleName)


def _load(uri: str, name: str, checksum: str | None, properties: dict) -> Any:
    """A volume node of a file."""
    if urlparse(uri).scheme != "file":
        raise NotImplementedError(f"The stand-in of SampleData reads local files only, not {uri}")
    path = Path(url2pathname(urlparse(uri).path))
    if checksum is not None:
        algorithm, digest = slicer.util.extractAlgoAndDigest(checksum)
        if slicer.util.computeChecksum(algorithm, str(path)) != digest:
            raise ValueError(f"The checksum of {path} is not the registered one")
    return slicer.util.loadVolume(str(path), {**properties, "name": name})


def _tuple(values: Any) -> tuple:
    """One value or many, as many."""
    return () if values is None else (values,) if isinstance(values, str) else tuple(values)

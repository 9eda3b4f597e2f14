"""``croissant.json``: metadata of a pool in Croissant 1.1, the JSON-LD format of dataset search engines and loaders.

It lists every file with its checksum and a record set that can be iterated without Zarr. It contains no publication
date or web address, and a creator only if one was given.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from lsmix.data.artifact import FileRecord
from lsmix.data.pool import POOL_COLUMNS, Pool
from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, Licence
from lsmix.pipeline.views.dataset_card.markup import clean
from lsmix.pipeline.views.dataset_card.readme import PoolDescription
from lsmix.pipeline.views.dataset_card.samples import SAMPLES_FILE, TableField, table_fields

__all__ = ["CROISSANT_FILE", "content_uri", "croissant"]

CROISSANT_FILE: Final = "croissant.json"
_SPECIFICATION: Final = "http://mlcommons.org/croissant/1.1"
_ZARR: Final = "https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"  # no registered media type of its own
_FORMATS: Final = {
    "csv": "text/csv",
    "json": "application/json",
    "md": "text/markdown",
    "png": "image/png",
    "txt": "text/plain",
}
_TERMS: Final = (
    "annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes", "extract", "field",
    "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5",
    "parentField", "path", "readLines", "recordSet", "references", "regex", "repeated", "replace", "samplingRate",
    "sdVersion", "separator", "source", "subField", "transform", "unArchive", "value",
)  # fmt: skip
_CONTEXT: Final[dict[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_TYPES: Final = {"source": "sc:Integer", "label": "sc:Integer", "share": "sc:Float", "word": "sc:Text"}


def croissant(
    described: PoolDescription,
    pool: Pool,
    licence: Licence,
    creator: str,
    files: Sequence[FileRecord],
    *,
    in_zarr: bool,
) -> bytes:
    """Return the Croissant description of a pool as JSON.

    Args:
        described: The description that the README uses.
        pool: The pool.
        licence: Licence of the base images.
        creator: Who made the pool; "" if unknown.
        files: Files of the pool or its export, and all card files except ``croissant.json``.
        in_zarr: Whether ``files`` contains the pool's Zarr store; False for an export.
    """
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": _SPECIFICATION,
        "name": clean(described.name),
        "description": clean(described.text),
        "license": _licence(licence),
        "url": content_uri(pool.manifest.content_digest),
        "version": "1.0.0",
        "keywords": ["image classification", "data augmentation", "mixed images", clean(pool.method)],
        "citeAs": clean(" ".join(described.citations(pool.manifest.content_digest))),
    }
    if creator:
        document["creator"] = {"@type": "sc:Person", "name": creator}
    document |= _provenance(described, licence)
    document["distribution"] = [_file_object(file) for file in files]
    document["recordSet"] = [_classes(pool), _statuses(), _samples(pool, in_zarr)]
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def content_uri(content_digest: str) -> str:
    """Return the RFC 6920 URI for a SHA-256 digest given in hex."""
    try:
        digest = base64.urlsafe_b64encode(bytes.fromhex(content_digest)).decode().rstrip("=")
    except ValueError:  # the manifest is untrusted
        return "ni:///sha-256;"
    return f"ni:///sha-256;{digest}"


def _licence(licence: Licence) -> str | dict[str, str]:
    if licence.url:
        return licence.url
    text = f"Licence of the base set that the images are derived from: {licence.text}." if licence.text else NO_LICENCE
    return {"@type": "sc:CreativeWork", "name": licence.text or "unknown", "description": text}


def _provenance(described: PoolDescription, licence: Licence) -> dict[str, Any]:
    spec, origin = described.spec, described.spec.origin
    title = f" {origin.config['title']}" if origin.config.get("title") else ""
    base: dict[str, Any] = {
        "@id": content_uri(origin.content_digest),
        "@type": "prov:Entity",
        "prov:label": clean(f"The base set{title}, {origin.train_images} training images"),
        "sc:license": licence.url or licence.text or "unknown",
    }
    if origin.config.get("url"):
        base["sc:url"] = clean(str(origin.config["url"]))
    if origin.citation:
        base["sc:citation"] = clean(origin.citation)
    sources = [base]
    if spec.latent:
        flow = {"@id": content_uri(spec.inputs["flow"]), "@type": "prov:Entity", "prov:label": "The Glow flow"}
        sources.append(flow)
    settings = msgspec.json.encode(spec.pool, order="sorted").decode()
    return {
        "prov:wasDerivedFrom": sources,
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": f"lsmix mix, stage version {spec.stage_version}",
            "sc:description": clean(f"Settings: {settings}. plan.json suffices to rebuild every pixel."),
            "prov:wasAssociatedWith": {
                "@type": "prov:SoftwareAgent",
                "prov:label": clean(f"lsmix {described.version}"),
            },
        },
    }


def _file_object(file: FileRecord) -> dict[str, Any]:
    ending = file.path.rpartition("/")[2].rpartition(".")[2]
    return {
        "@type": "cr:FileObject",
        "@id": clean(file.path),
        "name": clean(file.path.rpartition("/")[2]),
        "contentUrl": clean(file.path),
        "contentSize": f"{file.bytes} B",
        "encodingFormat": _FORMATS.get(ending, _ZARR),
        "sha256": file.sha256,
    }


def _classes(pool: Pool) -> dict[str, Any]:
    rows = [{"label": label, "name": clean(name)} for label, name in enumerate(pool.class_names)]
    return _enumeration("classes", "Names of the classes.", "label", {"label": "sc:Integer", "name": "sc:Text"}, rows)


def _statuses() -> dict[str, Any]:
    words = POOL_COLUMNS["status"].words
    rows = [{"name": name, "description": meaning} for name, meaning in words.items()]
    types = {"name": "sc:Text", "description": "sc:Text"}
    return _enumeration("statuses", "Meanings of the status column.", "name", types, rows)


def _enumeration(
    name: str, description: str, key: str, types: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "dataType": "sc:Enumeration",
        "key": {"@id": f"{name}/{key}"},
        "field": [
            {"@type": "cr:Field", "@id": f"{name}/{field}", "name": field, "dataType": kind}
            for field, kind in types.items()
        ],
        "data": [{f"{name}/{field}": value for field, value in row.items()} for row in rows],
    }


def _samples(pool: Pool, in_zarr: bool) -> dict[str, Any]:
    height, width, channels = pool.image_shape
    where = (
        f"The image of row r is element r of the Zarr v3 array pool.zarr/image, uint8 ({height}, {width}, {channels})."
    )
    description = f"One record for each of the {len(pool):,} mixed images, without the pixels"
    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "description": f"{description}. {where}" if in_zarr else f"{description}; see README.md for how to load them.",
        "key": {"@id": "samples/row"},
        "field": [_field(field) for field in table_fields(pool, in_zarr=in_zarr)],
    }


def _field(field: TableField) -> dict[str, Any]:
    described: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"samples/{field.name}",
        "name": field.name,
        "description": field.description,
        "dataType": [_TYPES[field.kind], "cr:Label"] if field.kind == "label" else _TYPES[field.kind],
        "source": {"fileObject": {"@id": SAMPLES_FILE}, "extract": {"column": field.name}},
    }
    if field.kind == "label":
        # mlcroissant 1.1.1 does not accept a reference without "field".
        described["references"] = {"field": {"@id": "classes/label"}}
    return described

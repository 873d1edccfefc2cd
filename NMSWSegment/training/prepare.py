"""`nmsw prepare`: collect what training reads of its data in one folder, see samples/prepared_set.py."""

import argparse
from itertools import chain
from pathlib import Path

from NMSWSegment.console import say
from NMSWSegment.data.prepared_case import prepare_case
from NMSWSegment.samples.prepared_set import read_anatomy, read_prepared_case, write_prepared_set
from NMSWSegment.training.datasets import find_data
from NMSWSegment.training.options import CT, MODALITIES, TrainOptions
from NMSWSegment.training.worker_processes import in_workers, lost_workers_explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw prepare`."""
    parser.add_argument("--data", action="append", required=True, metavar="KIND:FOLDER", help="as in 'nmsw train'; repeat to mix")
    parser.add_argument("--subset", default="", help="of totalsegmentator: organ, vertebrae, total, or class names with commas")
    parser.add_argument("--modality", default=CT, choices=MODALITIES, help="of the data (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read cases; 0 reads them in this one (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to create")


def run(arguments: argparse.Namespace) -> int:
    """`nmsw prepare`."""
    data = find_data(TrainOptions(data=tuple(arguments.data), subset=arguments.subset, modality=arguments.modality, augmentation="paper"))
    read = in_workers(prepare_case, data.requests, num_workers=min(arguments.workers, len(data.requests)))
    cases = zip((request.files.name for request in data.requests), read)
    prepared = ((entry.name, read_prepared_case(entry)) for entry in data.prepared_cases)
    anatomies = (read_anatomy(path, num_labels=len(data.label_names) + 1) for path in data.anatomies)
    with lost_workers_explained():
        write_prepared_set(arguments.output, label_names=data.label_names, modality=arguments.modality, cases=chain(cases, prepared), anatomies=anatomies)
    say(
        f"{len(data.requests) + len(data.prepared_cases)} cases and {len(data.anatomies)} anatomies in {arguments.output}. Train with --data prepared:{arguments.output}"
    )
    return 0

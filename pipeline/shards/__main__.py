"""Command line for shard sets.

    python -m pipeline.shards index ROOT     index WebDataset tars that were not written by pipeline.convert
    python -m pipeline.shards verify ROOT    compare every file with its checksum
    python -m pipeline.shards show ROOT      print classes, image sizes, colors and copies

If a folder has train/ and test/ or val/, or, such as hf://datasets/OWNER/NAME, holds X-train-*.tar and
X-validation-*.tar, each split is indexed.
The index of such a split, and of a set in a read-only location such as an http:// address, is kept in the local cache
($STREAMCLR_CACHE or ~/.cache/streamclr); run an interrupted command again to resume it.
"""

import argparse
import sys
from itertools import chain

from rich.console import Console

from ..common import UserError
from .archives import one_line
from .index import index_splits
from .samples import add_image_extension
from .verify import show, verify


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__.replace("-m pipeline.shards", f"-m {__package__}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["index", "verify", "show"])
    parser.add_argument(
        "root",
        help="folder or URL prefix of the tars or of their train/ and test/; index also takes tars in brace notation, "
        "such as https://host/folder/train-{000..146}.tar",
    )
    add_image_extension(parser)
    text = "8: index reads every image file as 8-bit RGB (default: the bits of an existing index, else all bits)"
    parser.add_argument("--bits", type=int, choices=[8], help=text)
    arguments = parser.parse_args()
    try:
        if arguments.command == "index":
            for shards in index_splits(arguments.root, None, arguments.image_extension, arguments.bits):
                for refused in shards.manifest["left_out"]:
                    print(f"left out {one_line(refused['name'])}: {refused['reason']}", file=sys.stderr)
                print(f"{len(shards)} images in {len(shards.manifest['shards'])} shards indexed.")
        elif arguments.command == "verify":
            found = verify(arguments.root)
            for root in (root for root, problems in found.items() if not problems):
                print(f"{root}: all files match their checksums.")
            sys.exit("\n".join(chain(*found.values())) or None)
        else:
            tables, problems = show(arguments.root)
            for table in tables:
                Console().print(table)
            sys.exit("\n".join(problems) or None)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no connection
        sys.exit(str(error))


if __name__ == "__main__":
    main()

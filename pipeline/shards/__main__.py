"""Command line of shard sets: index, verify and show."""

import argparse
import sys

from ..common import UserError


def main() -> None:
    from .archives import add_image_extension, one_line
    from .index import index_shards  # which build on this module
    from .verify import show, verify

    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["index", "verify", "show"])
    parser.add_argument("root", help="folder or URL prefix that holds the tars, or their train/ and test/")
    add_image_extension(parser)
    arguments = parser.parse_args()
    try:
        if arguments.command == "index":
            shards = index_shards(arguments.root, image_extension=arguments.image_extension)
            for refused in shards.manifest["left_out"]:
                print(f"left out {one_line(refused['name'])}: {refused['reason']}", file=sys.stderr)
            print(f"{len(shards)} images in {len(shards.manifest['shards'])} shards indexed.")
        elif problems := (verify if arguments.command == "verify" else show)(arguments.root):
            raise UserError("\n".join(problems))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no connection
        sys.exit(str(error))


if __name__ == "__main__":
    main()

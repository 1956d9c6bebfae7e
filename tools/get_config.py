"""config.json from the yaml of the current folder.

    cd model_path && python get_config.py

is what mindformers' research/telechat2/get_config.py does. Exactly one yaml is asked for, where that script took
whichever the file system listed first. `telechat-mindie build` writes the file by itself.
"""

from __future__ import annotations

from pathlib import Path

import scripts

from telechat_mindie.model_dir.serving import config_json_from_yaml, find_yaml
from telechat_mindie.staging import dump_json, write_file


def main() -> None:
    scripts.parser(__doc__).parse_args()
    yaml = find_yaml(Path.cwd())
    write_file(Path.cwd() / "config.json", dump_json(config_json_from_yaml(yaml)))
    print(f"config.json, from {yaml.name}")


if __name__ == "__main__":
    scripts.run(main)

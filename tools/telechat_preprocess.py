"""Conversations as mindrecord, row by row as mindformers' research/telechat2/telechat_preprocess.py makes it.

    python tools/telechat_preprocess.py --input_dataset_file DATA --vocab_file_path tokenizer.model \\
        --max_length 8192 --output_path DIR

Names and flags are the published script's; the result is DIR/dataset.mindrecord, or the file that --output_path names
by the ending .mindrecord. `telechat-mindie preprocess` makes better rows.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import scripts

from telechat_mindie.commands.output import byte_progress
from telechat_mindie.data.preprocess import Options, preprocess_as_recipe
from telechat_mindie.data.recipe import SEED, Markers, Recipe
from telechat_mindie.errors import OutputError
from telechat_mindie.staging import reporting_os_errors


def main() -> None:
    parser = scripts.parser(__doc__)
    parser.add_argument("--input_dataset_file", required=True, help="JSON lines or a JSON array, or a pattern")
    parser.add_argument("--output_path", type=Path, required=True, help="directory to make")
    parser.add_argument("--vocab_file_path", type=Path, required=True, help="tokenizer.model")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens of a row less one")
    parser.add_argument("--seed", type=int, default=SEED, help="of the shuffle")
    for name in ("start", "user", "bot", "end", "pad"):
        parser.add_argument(f"--{name}_token", default=getattr(Markers, name))
    given = parser.parse_args()
    marks = Markers(given.start_token, given.user_token, given.bot_token, given.end_token, given.pad_token)
    recipe = Recipe(given.vocab_file_path, given.max_length, marks, given.seed)
    options = Options(given.max_length)
    output: Path = given.output_path
    with byte_progress("preprocessing") as start:
        if output.suffix != ".mindrecord":
            report = preprocess_as_recipe([given.input_dataset_file], output, recipe, options, start)
        elif output.exists():
            raise OutputError("exists", where=output, advice="Choose another path.")
        else:
            with (
                reporting_os_errors(output),
                TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as scratch,
            ):
                made = Path(scratch, "rows")
                report = preprocess_as_recipe([given.input_dataset_file], made, recipe, options, start, output.stem)
                for name in (
                    f"{output.name}.db",
                    output.name,
                ):  # the index first: the file that is asked for comes last
                    (made / name).replace(output.parent / name)
    print(f"{output}: {report.rows} rows of {report.examples} records, {report.dropped} in no row")


if __name__ == "__main__":
    scripts.run(main)

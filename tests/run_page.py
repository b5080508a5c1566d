"Run the code cells of one notebook in this process: python run_page.py PAGE.ipynb"
import sys

import matplotlib
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

matplotlib.use("agg")


def main(path):
    shell = CaptureShell()
    for i, cell in enumerate(read_nb(path).cells):
        if cell.cell_type != "code":
            continue
        shell.run(cell.source, stdout=False)
        if shell.exc:
            print(f"{path}, cell {i}:\n{cell.source}\n{shell.pretty_tb() if hasattr(shell, 'pretty_tb') else ''}{shell.exc!r}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

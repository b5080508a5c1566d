"Run the code cells of one notebook in this process: python run_page.py PAGE.ipynb"
import os
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


def main_in(folder, path, log):
    "The same in a folder, with the standard streams of this process going to a file."
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    sys.exit(main(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Results of version 0.1 that later versions must repeat: losses, and a training that goes on.

``cases.py`` says what is computed, ``losses.json`` what version 0.1 found, and for the heads that
came after it (PKD, CWD, CrossKD) what their first version found; ``training.py`` and the
folder ``run_0_1`` are the same for a training. ``python -m tests.golden.write`` writes the files.

What is here outlives changes inside d2kd: it uses config keys, registered names and command lines,
and no module of d2kd. Weights and images come from NumPy, so that they do not depend on PyTorch's
version.
"""

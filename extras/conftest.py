"""The tests of extras/ run on the CPU, in one thread, as test_cabins.py does."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks only wait for more threads

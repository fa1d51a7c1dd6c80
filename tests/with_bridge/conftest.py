import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # bridges.py
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

"""One thread a process, in the tests and in all that they start.

The models are tiny, and two processes with two threads each on two cores wait for one another.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                        # before torch is imported

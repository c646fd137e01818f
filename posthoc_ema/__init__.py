"""posthoc_ema: choose the EMA length after training.

Track a few power-function averages of the weights while training, keep snapshots of them, and
combine those afterwards into an average of any length.

    ema = EMA(sigma_rel=(0.05, 0.10), snapshots="run/ema", every=1000)
    ...
    ema.update(model)                                  # after each optimiser step
    ...
    weights = reconstruct("run/ema", sigma_rel=0.07)   # any time later

Importing this package loads numpy and nothing heavier.
"""

from posthoc_ema.conversion import gamma_to_sigma_rel as gamma_to_sigma_rel
from posthoc_ema.conversion import sigma_rel_to_gamma as sigma_rel_to_gamma
from posthoc_ema.convert import convert as convert
from posthoc_ema.ema import EMA as EMA
from posthoc_ema.errors import CorruptSnapshotError as CorruptSnapshotError
from posthoc_ema.errors import ForeignSnapshotError as ForeignSnapshotError
from posthoc_ema.errors import MissingInputError as MissingInputError
from posthoc_ema.errors import NonFiniteError as NonFiniteError
from posthoc_ema.errors import PosthocEMAError as PosthocEMAError
from posthoc_ema.errors import SnapshotError as SnapshotError
from posthoc_ema.errors import SnapshotVersionError as SnapshotVersionError
from posthoc_ema.errors import SnapshotWriteError as SnapshotWriteError
from posthoc_ema.errors import StateError as StateError
from posthoc_ema.errors import StructureError as StructureError
from posthoc_ema.errors import UnsafePickleError as UnsafePickleError
from posthoc_ema.forecast import predict_error as predict_error
from posthoc_ema.importing.write import Import as Import
from posthoc_ema.importing.write import import_snapshots as import_snapshots
from posthoc_ema.plan import Plan as Plan
from posthoc_ema.plan import plan as plan
from posthoc_ema.profiles import Custom as Custom
from posthoc_ema.profiles import Exponential as Exponential
from posthoc_ema.profiles import PowerFunction as PowerFunction
from posthoc_ema.profiles import Profile as Profile
from posthoc_ema.profiles import Uniform as Uniform
from posthoc_ema.pruning import Pruning as Pruning
from posthoc_ema.pruning import prune as prune
from posthoc_ema.reconstruct import Reconstruction as Reconstruction
from posthoc_ema.reconstruct import reconstruct as reconstruct
from posthoc_ema.schedule import AtTimes as AtTimes
from posthoc_ema.schedule import Every as Every
from posthoc_ema.schedule import beta as beta
from posthoc_ema.snapshot_file import Snapshot as Snapshot
from posthoc_ema.snapshots import SnapshotStore as SnapshotStore
from posthoc_ema.solve import Solution as Solution
from posthoc_ema.solve import solve as solve
from posthoc_ema.sweep import SweepResult as SweepResult
from posthoc_ema.sweep import find_best as find_best
from posthoc_ema.sweep import sweep as sweep

__version__ = "0.1.0"

"A run's folder, record and attempts: `run.open_run`, `run.read_record`, ... The parts are in the modules of this folder."
from .identity import *
from .provenance import *
from .locks import *
from .record import *
from .state import *
from .attempt import *
from .find import *

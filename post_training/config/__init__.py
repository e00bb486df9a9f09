"The configuration: `config.compose` and what surrounds it. The parts are in the modules of this folder."
from .schema import *
from .overrides import *
from .presets import *
from .batch import *
from .preference_losses import *
from .refusals import *
from .compose import *

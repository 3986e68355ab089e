import signal as _signal
import sys as _sys
from pathlib import Path as _Path

# Ctrl-C while the commands are imported ends the program without a traceback; main() hears it from then on.
if _Path(_sys.argv[0]).name in ("-m", "owpo") and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

"""The exit codes of the command line."""

DONE = 0
DEFECT = 1
MISTAKE = 2
DIFFERENT = 3
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 130
MEANINGS = (
    (DONE, "done"),
    (DEFECT, "a defect in errata, shown with its traceback"),
    (MISTAKE, "something that you can correct, explained in one line"),
    (DIFFERENT, "an edit did not take, a fact does not hold, or two folders of edits differ"),
    (STOPPED, "stopped early by SIGTERM or time_limit=; the same command continues"),
    (INTERRUPTED, "stopped by Ctrl-C"),
)

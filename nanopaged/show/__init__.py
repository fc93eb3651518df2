"""What really happened, recorded and shown: as a movie, as a trace, on a terminal. Files in reading order:

    recording, reading       a run is written down, and read
    replay, rules, captions  the state at each moment, and in words what happened and why
    movie, page/, scenes     a page for a browser, and small runs that show one idea each
    trace                    the same for Perfetto
    moment, still, tour      pictures for the docs
    terminal                 the demo's picture of the pool
    keep                     what of this the demo's flags ask for
"""

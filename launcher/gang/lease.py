"""How long training may go on unsupervised. No run is executed twice at the same time, although nobody can ask a host that is cut off: its
runner kills its training process when its supervisor has said nothing for a while, and a next supervisor begins when that while is over.
"""

EVENT_WAIT_S = 5.0
"""How long a runner holds a question for events before it answers with none."""
LEASE_S = 10.0
"""A runner that no question has reached for so long kills its training process."""
SILENCE_S = EVENT_WAIT_S + LEASE_S + 1.0
"""After the last sign of life of a supervisor none of its training processes lives longer than this."""

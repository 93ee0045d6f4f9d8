"""Ray, and nothing outside this room knows it: connect, look at the nodes, run sessions as actors, let go.

Used by `orchestrator.driver`. A session's actor owns its server (`workers.session`); load runs as a Ray task on the
actor's own node.
"""

from orchestrator.cluster.connection import Cluster
from orchestrator.cluster.errors import ActorFailed, ActorLost, ClusterError, NoCards
from orchestrator.cluster.handle import SessionHandle

__all__ = ["ActorFailed", "ActorLost", "Cluster", "ClusterError", "NoCards", "SessionHandle"]

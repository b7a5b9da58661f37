"""The client of a served teacher."""

from rlad.config.teacher import ServedTeacherConfig
from rlad.replicas import ReplicaClient


class CompletionsClient(ReplicaClient):
    """Sends requests to the replicas of a served teacher."""

    settings: ServedTeacherConfig

    def __init__(self, settings: ServedTeacherConfig):
        super().__init__(
            settings,
            whose="teacher",
            section="teacher",
            advice="check teacher.urls, which mostly end in /v1, teacher.model and the server's "
            "log",
            max_concurrent_requests=settings.max_concurrent_requests,
        )

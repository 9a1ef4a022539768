"""What all tests share."""

from hypothesis import settings

settings.register_profile("calm", deadline=None)  # the machine may be busy
settings.load_profile("calm")

"""A schedule is right when it is the same linear map as diffusers' own scheduler."""

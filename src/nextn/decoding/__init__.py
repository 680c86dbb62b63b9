"""Lossless self-speculative decoding: drafting, one verifying trunk forward a step, rollback by position."""

"""The ground floor: pure functions and state machines that every other floor uses; no network."""

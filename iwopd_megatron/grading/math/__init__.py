"""Mathematics in answers: the last box of a response against the reference answer.

In come two texts; out goes whether they say the same. `grader` is the way in: box, `normalise`,
`readings` (letter, name, value, unit), `compare`.
"""

__all__ = ["boxes", "grader"]

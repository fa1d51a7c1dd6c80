"""The sections of a report: titles, in the order of the page, and what each one shows."""

CAPTIONS = {
    "Accuracy": (
        "On the evaluation problems. Line: mean over seeds; band: ± 1 standard error; thin: up "
        "to five single seeds. Second chart: gain over OPD, paired by seed (Fig. 1a, 2a). "
        "Where several pairs of models are compared, final gain against how much smaller the "
        "student is (Fig. 2b)."
    ),
    "Continuing from student prefixes": (
        "The student's responses are cut, and student and teacher go on from there: their "
        "chance of a right answer, with 95 % bootstrap intervals over problems (Fig. 1b)."
    ),
    "Reverse KL": (
        "Mean student − teacher log-probability of the student's own tokens, an estimate of "
        "KL(student ‖ teacher). Second chart: by position, first three rounds of all runs "
        "(dotted) against the last three, as far as 5 % of the responses reach (Fig. 3a, 3b)."
    ),
    "Likelihood of student prefixes": (
        "Cumulative log-probability of the first tokens of the student's responses, mean over "
        "responses; one that has ended stays where it ended. Under student and teacher, first "
        "three rounds; and the teacher's minus the student's, last three (Fig. 3c)."
    ),
    "Where the weight goes": (
        "Mean token weight by tenth of the response, over all rounds; OPD is 1. Then the "
        "unsigned rule (iw) and the signed rule (iw_signed) on single responses of an early "
        "round (Fig. 4b)."
    ),
    "By position": (
        "Mean over the tokens of each tenth of a response. |gap|: first three rounds (dotted), "
        "last three; others: all rounds. Shares that are zero throughout are left out."
    ),
    "Health": "Engine drift: mean |trainer − rollout engine| log-probability of the same tokens.",
    "Load of the experts": (
        "Of the student's routers, mean over layers: busiest expert over the mean one, 1 is "
        "even; and standard deviation over mean."
    ),
    "Time": (
        "Phases of a round, and response tokens per second of the whole round; “other” is what "
        "the phases leave."
    ),
    "Services": (
        "Time to give the rollout servers new weights and prove it; and the share of answers "
        "whose teacher scores were there when the round's last answer ended."
    ),
}

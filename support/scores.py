"""The result of an evaluation, its lines on the terminal and its entries in summary.json.

A result is {score or "length": mean}. With --eval-data it also has "sets": {name of a set: its
"eval_count" and means}. Then a score is the mean of the sets', each counted once however many
problems it has: the last column of a table of benchmarks. The length is that of all responses.
"""
MODES = ("greedy", "T = 1")  # how an evaluation samples; a pair (greedy, sampled) has this order
FIRST_COLUMN = 24  # characters of the final table's first column, or more for long names


def averages(problems, columns):
    """columns: {score or "length": its value for each problem} -> a result."""
    result = {name: sum(values) / len(problems) for name, values in columns.items()}
    places = {}  # set: where its problems are
    for i, problem in enumerate(problems):
        if "eval_set" in problem:
            places.setdefault(problem["eval_set"], []).append(i)
    if not places:
        return result
    sets = {}
    for name, some in places.items():
        means = {key: sum(values[i] for i in some) / len(some) for key, values in columns.items()}
        sets[name] = {"eval_count": len(some)} | means
    for key in columns.keys() - {"length"}:
        result[key] = sum(one[key] for one in sets.values()) / len(sets)
    return result | {"sets": sets}


def standard_error(p, n):
    """The binomial standard error of a share p of n problems; 0 for a mean that is no share."""
    return max(0.0, p * (1 - p) / n) ** 0.5


def error_of_mean(shares):
    """The standard error of the mean of shares: [(share, number of problems)]."""
    return sum(standard_error(p, n) ** 2 for p, n in shares) ** 0.5 / len(shares)


def with_error(p, n, shares=None):
    """A share of n problems, or a mean of `shares`, for the terminal."""
    return f"{p:.3f} +- {error_of_mean(shares or [(p, n)]):.3f}"


def score_text(result, score, count):
    shares = [(one[score], one["eval_count"]) for one in result.get("sets", {}).values()]
    return with_error(result[score], count, shares)


def print_evaluation(label, result, count, seconds, scores):
    """One line for an evaluation; of several sets a line for each, then one for their mean."""
    sets = result.get("sets", {})
    for name, one in sets.items():
        if len(sets) > 1:
            print(f"{label}, {name}: {evaluation_text(one, one['eval_count'], scores)})")
    if sets:
        label += f", mean of {len(sets)} sets" if len(sets) > 1 else f", {next(iter(sets))}"
    print(f"{label}: {evaluation_text(result, count, scores)}, {seconds:.1f} s)", flush=True)


def evaluation_text(result, count, scores):
    cells = [f"{score} {score_text(result, score, count)}" for score in scores]
    return f"{'  '.join(cells)}  ({count} problems, {result['length']:.0f} tokens each"


def print_table(base, final, count, scores):
    """The scores before and after training. base, final: pairs of results (greedy, sampled).

    Of several sets: their means, and the greedy scores of each.
    """
    lines = []
    sets = base[0].get("sets", {})
    prefix = "mean, " if len(sets) > 1 else ""
    for mode, before, after in zip(MODES, base, final):
        for score in scores:
            lines.append((f"{prefix}{mode}, {score}", score_text(before, score, count),
                          score_text(after, score, count)))
    for name, one in sets.items():
        for score in scores if prefix else []:
            pair = [one[score], final[0]["sets"][name][score]]
            lines.append((f"{name}, {MODES[0]}, {score}",
                          *(with_error(p, one["eval_count"]) for p in pair)))
    title = f"{count} held-out problems" + (f", {len(sets)} sets" if prefix else "")
    width = max(FIRST_COLUMN, len(title), *(len(words) for words, _, _ in lines))
    print(f"\n{title:<{width + 4}}before            after")
    for title, before, after in lines:
        print(f"{title:<{width}}  {before}    {after}")


def main_score(scores):
    return "strict" if "strict" in scores else scores[0]


def key(score, sampled, main):
    """A score's name in summary.json: its own; sampled for the main one, else sampled_<name>."""
    if not sampled:
        return score
    return "sampled" if score == main else f"sampled_{score}"


def summary_scores(pair, scores, prefix=""):
    """The entries of summary.json for the results (greedy, sampled) of an evaluation."""
    main = main_score(scores)
    entries = {}
    for sampled, result in enumerate(pair):
        for score in scores:
            entries[prefix + key(score, sampled, main)] = result[score]
    return entries


def summary_sets(pairs, scores):
    """{"sets": {name: "eval_count" and the entries of this set}}; {} without --eval-data.

    pairs: {prefix of the entries: (greedy, sampled)}.
    """
    sets = {}
    for prefix, pair in pairs.items():
        for name, one in pair[0].get("sets", {}).items():
            entries = sets.setdefault(name, {"eval_count": one["eval_count"]})
            entries |= summary_scores([result["sets"][name] for result in pair], scores, prefix)
    return {"sets": sets} if sets else {}

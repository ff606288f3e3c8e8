# ruff: noqa: E501 (a table is read by its rows)
"""The vocabulary of the demo programs: what one operation is, and those on numbers and lists of numbers.

An operation knows how it is said (phrases) and how it is written (equivalent expressions); its first expression is
the reference that every program is checked against.  Placeholders in expressions: ``{v}`` the current value, ``{i}``
one item of it, ``{k}`` the operation's argument.  In phrases: ``{item}`` and ``{items}`` what the list holds,
``{it}`` the whole value, ``{k}`` the argument, ``{x}`` (only in ``noun``) the phrase that the operation applies to.

No operation may be written exactly like a chain of others: the split into training and held-out tasks is by
chain, so two chains that print the same code would leak one into the other.
"""

from dataclasses import dataclass

NUMBERS, WORDS, TEXT, NUMBER, TABLE, TRUTH = "list[int]", "list[str]", "str", "int", "dict[str, int]", "bool"


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: each exists once
class Operation:
    """One step of a program."""

    name: str
    takes: str
    gives: str
    code: tuple[str, ...]  # equivalent expressions; for "map" and "filter" they speak of one item
    verbs: tuple[str, ...]  # imperative phrases
    noun: str = ""  # "the sum of {x}"
    final: tuple[str, ...] = ()  # what "return ..." says when this is the last step: "their sum"
    argument: str = ""  # a key of ARGUMENTS, or nothing
    shape: str = "value"  # "value", or "map"/"filter" for one expression on each item of a list
    short: str = ""  # for function names


# Literal values that an argument may take.  0, 1 and 2 are left out where another operation would print the same code.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "bound": (-4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20),
    "amount": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20),
    "factor": (3, 4, 5, 6, 7, 8, 9, 10),
    "count": (2, 3, 4, 5),
    "length": (2, 3, 4, 5, 6),
    "letter": tuple("abcdeghilmnoprst"),
}


def item_filter(name: str, kind: str, code: tuple[str, ...], clauses: tuple[str, ...], argument: str = "") -> Operation:
    """A filter; every clause completes 'keep the numbers ...'."""
    frames = ("keep only the {items} C", "keep the {items} C", "select the {items} C", "pick out the {items} C",
              "drop all {items} except those C", "ignore everything but the {items} C")  # fmt: skip
    verbs = tuple(frame.replace("C", clause) for clause in clauses for frame in frames)
    short = name.split("_", 1)[1]
    return Operation(name, kind, kind, code, verbs, "{x} " + clauses[0], argument=argument, shape="filter", short=short)


def item_map(
    name: str, takes: str, code: tuple[str, ...], verbs: tuple[str, ...], noun: str = "", argument: str = "",
    gives: str = "",
) -> Operation:  # fmt: skip
    """One expression on each item."""
    return Operation(name, takes, gives or takes, code, verbs, noun, argument=argument, shape="map", short=name)


def value(
    name: str, takes: str, gives: str, code: tuple[str, ...], verbs: tuple[str, ...], noun: str = "",
    final: tuple[str, ...] = (), argument: str = "",
) -> Operation:  # fmt: skip
    """One expression on the whole value."""
    return Operation(name, takes, gives, code, verbs, noun, final, argument, short=name)


def list_operations(kind: str) -> list[Operation]:
    """What works on any list."""
    mark = "numbers" if kind == NUMBERS else "words"

    def same(name: str, code: tuple[str, ...], verbs: tuple[str, ...], noun: str = "", argument: str = "") -> Operation:
        return Operation(f"{name}_{mark}", kind, kind, code, verbs, noun, argument=argument, short=name)

    up = "in ascending order" if kind == NUMBERS else "alphabetically"
    down = "in descending order" if kind == NUMBERS else "in reverse alphabetical order"
    return [
        same("sort", ("sorted({v})",), (f"sort the {{items}} {up}", f"put them {up}", f"order the {{items}} {up}")),
        same("sort_down", ("sorted({v}, reverse=True)",), (f"sort the {{items}} {down}", f"put them {down}",
             f"order the {{items}} {down}")),
        same("reverse", ("{v}[::-1]", "list(reversed({v}))"), ("reverse the order of the {items}", "reverse the list",
             "turn the list around"), "{x} in reverse order"),
        same("take", ("{v}[:{k}]",), ("take the first {k}", "keep the first {k} {items}", "cut the list after {k} {items}"),
             "the first {k} of {x}", "count"),
        same("skip", ("{v}[{k}:]",), ("skip the first {k}", "drop the first {k} {items}", "leave out the first {k} {items}"),
             "all but the first {k} of {x}", "count"),
        same("tail", ("{v}[-{k}:]",), ("take the last {k}", "keep the last {k} {items}", "keep only the final {k} {items}"),
             "the last {k} of {x}", "count"),
        same("cut_tail", ("{v}[:-{k}]",), ("drop the last {k}", "remove the last {k} {items}", "leave out the final {k} {items}"),
             "all but the last {k} of {x}", "count"),
        same("every_second", ("{v}[::2]",), ("keep every second {item}, starting with the first", "take every other {item}"),
             "every second one of {x}"),
        same("every_third", ("{v}[::3]",), ("keep every third {item}, starting with the first", "take each third {item}")),
        same("unique", ("list(dict.fromkeys({v}))",), ("remove duplicates, keeping the first of each",
             "drop repeated {items}", "keep each distinct {item} once"), "the distinct ones of {x}"),
        same("trim_ends", ("{v}[1:-1]",), ("remove the first and the last {item}", "drop both ends of the list"),
             "{x} without the two ends"),
        same("mirror", ("{v} + {v}[::-1]",), ("append the reversed list", "add the list reversed at the end",
             "extend the list with its mirror image")),
        same("twice", ("{v} * 2", "{v} + {v}"), ("repeat the list twice", "write the list two times in a row")),
        same("rotate", ("{v}[1:] + {v}[:1]",), ("move the first {item} to the end", "rotate the list left by one")),
        same("rotate_back", ("{v}[-1:] + {v}[:-1]",), ("move the last {item} to the front", "rotate the list right by one")),
    ]  # fmt: skip


NUMBER_ITEMS = [
    item_filter("keep_above", NUMBERS, ("{i} > {k}",), ("greater than {k}", "above {k}", "larger than {k}"), "bound"),
    item_filter("keep_below", NUMBERS, ("{i} < {k}",), ("less than {k}", "below {k}", "smaller than {k}"), "bound"),
    item_filter("keep_at_least", NUMBERS, ("{i} >= {k}",), ("that are at least {k}", "not less than {k}"), "bound"),
    item_filter("keep_at_most", NUMBERS, ("{i} <= {k}",), ("that are at most {k}", "not greater than {k}"), "bound"),
    item_filter("keep_other_than", NUMBERS, ("{i} != {k}",), ("different from {k}", "other than {k}"), "bound"),
    item_filter("keep_even", NUMBERS, ("{i} % 2 == 0",), ("that are even", "divisible by two")),
    item_filter("keep_odd", NUMBERS, ("{i} % 2 == 1", "{i} % 2 != 0"), ("that are odd", "not divisible by two")),
    item_filter("keep_positive", NUMBERS, ("{i} > 0",), ("that are positive", "above zero")),
    item_filter("keep_negative", NUMBERS, ("{i} < 0",), ("that are negative", "below zero")),
    item_filter("keep_nonzero", NUMBERS, ("{i} != 0",), ("that are not zero", "different from zero")),
    item_filter("keep_multiples", NUMBERS, ("{i} % {k} == 0",), ("divisible by {k}", "that are multiples of {k}"), "factor"),
    item_filter("keep_indivisible", NUMBERS, ("{i} % {k} != 0",), ("not divisible by {k}", "that are no multiple of {k}"),
                "factor"),
    item_filter("keep_ending", NUMBERS, ("abs({i}) % 10 == {k}",), ("whose last digit is {k}", "ending in the digit {k}"),
                "count"),
    item_map("double", NUMBERS, ("{i} * 2", "2 * {i}"), ("double each {item}", "double every {item}"), "the doubles of {x}"),
    item_map("square", NUMBERS, ("{i} * {i}", "{i} ** 2"), ("square each {item}", "replace each {item} with its square",
             "square every {item}"), "the squares of {x}"),
    item_map("cube", NUMBERS, ("{i} ** 3",), ("cube each {item}", "raise every {item} to the third power"), "the cubes of {x}"),
    item_map("negate", NUMBERS, ("-{i}",), ("negate each {item}", "flip the sign of every {item}"), "the negatives of {x}"),
    item_map("absolute", NUMBERS, ("abs({i})",), ("take the absolute value of each {item}", "drop the sign of every {item}"),
             "the absolute values of {x}"),
    item_map("add", NUMBERS, ("{i} + {k}",), ("add {k} to each {item}", "increase every {item} by {k}"), "", "amount"),
    item_map("subtract", NUMBERS, ("{i} - {k}",), ("subtract {k} from each {item}", "decrease every {item} by {k}"), "", "amount"),
    item_map("subtract_from", NUMBERS, ("{k} - {i}",), ("subtract each {item} from {k}", "replace each {item} with {k} minus it"),
             "", "amount"),
    item_map("multiply", NUMBERS, ("{i} * {k}",), ("multiply each {item} by {k}", "scale every {item} by {k}"), "", "factor"),
    item_map("divide", NUMBERS, ("{i} // {k}",), ("divide each {item} by {k}, rounding down",
             "floor-divide every {item} by {k}"), "", "factor"),
    item_map("remainder", NUMBERS, ("{i} % {k}",), ("take each {item} modulo {k}", "replace each {item} with its remainder by {k}"),
             "", "factor"),
    item_map("cap", NUMBERS, ("min({i}, {k})",), ("cap each {item} at {k}", "limit every {item} to at most {k}"), "", "bound"),
    item_map("raise_to", NUMBERS, ("max({i}, {k})",), ("raise each {item} to at least {k}", "make every {item} at least {k}"),
             "", "bound"),
    item_map("last_digit", NUMBERS, ("abs({i}) % 10",), ("take the last digit of each {item}",
             "replace each {item} with its last digit"), "the last digits of {x}"),
    item_map("digit_counts", NUMBERS, ("len(str(abs({i})))",), ("count the digits of each {item}",
             "replace each {item} with its number of digits"), "the digit counts of {x}"),
    item_map("texts", NUMBERS, ("str({i})",), ("turn each {item} into a string", "convert every {item} to text"),
             "{x} as strings", gives=WORDS),
    item_map("stars", NUMBERS, ('"*" * {i}',), ("replace each {item} with that many stars", "draw a bar of stars for each {item}"),
             "", gives=WORDS),
]  # fmt: skip

NUMBER_LISTS = [
    *list_operations(NUMBERS),
    value("sort_by_size", NUMBERS, NUMBERS, ("sorted({v}, key=abs)",), ("sort the {items} by absolute value",
          "order them by distance from zero")),
    value("differences", NUMBERS, NUMBERS, ("[b - a for a, b in zip({v}, {v}[1:])]",),
          ("take the differences between neighbours", "replace the list with the steps from one {item} to the next")),
    value("pair_sums", NUMBERS, NUMBERS, ("[a + b for a, b in zip({v}, {v}[1:])]",),
          ("add each {item} to its right neighbour", "take the sums of neighbours")),
    value("weigh", NUMBERS, NUMBERS, ("[i * n for i, n in enumerate({v})]",),
          ("multiply each {item} by its index", "weigh every {item} by its position, counted from 0")),
    value("append", NUMBERS, NUMBERS, ("{v} + [{k}]",), ("append {k}", "add {k} at the end of the list"), argument="amount"),
    value("prepend", NUMBERS, NUMBERS, ("[{k}] + {v}",), ("prepend {k}", "put {k} at the front of the list"), argument="amount"),
    value("sum", NUMBERS, NUMBER, ("sum({v})",), ("add up the {items}", "sum the {items}"), "the sum of {x}",
          ("their sum", "the total")),
    value("count_numbers", NUMBERS, NUMBER, ("len({v})",), ("count the {items}", "count them"), "the number of {x}",
          ("how many there are", "how many {items} are left")),
    value("largest", NUMBERS, NUMBER, ("max({v}, default=0)",), ("take the largest (0 if empty)", "find the maximum, or 0"),
          "the largest of {x}, or 0", ("the largest one, or 0", "their maximum (0 if there is none)")),
    value("smallest", NUMBERS, NUMBER, ("min({v}, default=0)",), ("take the smallest (0 if empty)", "find the minimum, or 0"),
          "the smallest of {x}, or 0", ("the smallest one, or 0", "their minimum (0 if there is none)")),
    value("span", NUMBERS, NUMBER, ("max({v}) - min({v}) if {v} else 0",),
          ("take the distance from minimum to maximum, or 0", "find the range, largest minus smallest, or 0"),
          final=("their range, largest minus smallest, or 0",)),
    value("head", NUMBERS, NUMBER, ("{v}[0] if {v} else 0",), ("take the first {item}, or 0", "pick the first one (0 if empty)"),
          "the first of {x}, or 0", ("the first one, or 0",)),
    value("final", NUMBERS, NUMBER, ("{v}[-1] if {v} else 0",), ("take the last {item}, or 0", "pick the last one (0 if empty)"),
          "the last of {x}, or 0", ("the last one, or 0",)),
    value("mean", NUMBERS, NUMBER, ("sum({v}) // len({v}) if {v} else 0",),
          ("take the average rounded down, or 0", "compute the mean rounded down (0 if empty)"),
          final=("their average rounded down, or 0",)),
    value("occurrences", NUMBERS, NUMBER, ("{v}.count({k})",), ("count how often {k} occurs", "count the {items} equal to {k}"),
          final=("how many are equal to {k}", "how often {k} occurs"), argument="bound"),
    value("contains", NUMBERS, TRUTH, ("{k} in {v}",), ("check if {k} is in the list",), "",
          ("whether {k} is among them", "True if {k} is in the list"), "bound"),
    value("ascending", NUMBERS, TRUTH, ("{v} == sorted({v})",), ("check if the list is sorted",), "",
          ("whether they are in ascending order", "True if the list is sorted")),
    value("repeats", NUMBERS, TRUTH, ("len(set({v})) < len({v})",), ("check for duplicates",), "",
          ("whether any {item} occurs twice", "True if there are duplicates")),
    value("symmetric", NUMBERS, TRUTH, ("{v} == {v}[::-1]",), ("check if the list is symmetric",), "",
          ("whether the list reads the same backwards", "True if the list is symmetric")),
    value("sum_above", NUMBERS, TRUTH, ("sum({v}) > {k}",), ("check if the sum exceeds {k}",), "",
          ("whether the sum is greater than {k}", "True if the total exceeds {k}"), "bound"),
]  # fmt: skip

SINGLE_NUMBERS = [
    value("plus", NUMBER, NUMBER, ("{v} + {k}",), ("add {k} to {it}", "increase {it} by {k}"), argument="amount"),
    value("minus", NUMBER, NUMBER, ("{v} - {k}",), ("subtract {k} from {it}", "decrease {it} by {k}"), argument="amount"),
    value("times", NUMBER, NUMBER, ("{v} * {k}",), ("multiply {it} by {k}", "scale {it} by {k}"), argument="factor"),
    value("over", NUMBER, NUMBER, ("{v} // {k}",), ("divide {it} by {k}, rounding down", "floor-divide {it} by {k}"),
          argument="factor"),
    value("modulo", NUMBER, NUMBER, ("{v} % {k}",), ("take {it} modulo {k}", "take the remainder of {it} by {k}"),
          final=("the remainder after division by {k}",), argument="factor"),
    value("squared", NUMBER, NUMBER, ("{v} ** 2",), ("square {it}", "raise {it} to the second power"), "the square of {x}",
          ("the square of {it}",)),
    value("magnitude", NUMBER, NUMBER, ("abs({v})",), ("take the absolute value of {it}", "drop the sign of {it}"),
          "the absolute value of {x}", ("the absolute value",)),
    value("opposite", NUMBER, NUMBER, ("-{v}",), ("negate {it}", "flip the sign of {it}"), "the negative of {x}"),
    value("at_most", NUMBER, NUMBER, ("min({v}, {k})",), ("cap {it} at {k}", "limit {it} to at most {k}"), argument="bound"),
    value("at_least", NUMBER, NUMBER, ("max({v}, {k})",), ("raise {it} to at least {k}", "make {it} at least {k}"),
          argument="bound"),
    value("digits", NUMBER, NUMBERS, ("[int(d) for d in str(abs({v}))]",), ("list the decimal digits of {it}",
          "split {it} into its digits"), "the digits of {x}"),
    value("upto", NUMBER, NUMBERS, ("list(range({v}))",), ("list the integers from 0 up to but not including {it}",
          "count from 0 to one below {it}")),
    value("from_one", NUMBER, NUMBERS, ("list(range(1, {v} + 1))",), ("list the integers from 1 to {it}",
          "count from 1 up to {it}")),
    value("countdown", NUMBER, NUMBERS, ("list(range({v}, 0, -1))",), ("list the integers from {it} down to 1",
          "count down from {it} to 1")),
    value("divisors", NUMBER, NUMBERS, ("[d for d in range(1, {v} + 1) if {v} % d == 0]",), ("list the divisors of {it}",
          "find all positive divisors of {it}"), "the divisors of {x}"),
    value("multiples", NUMBER, NUMBERS, ("[{v} * i for i in range(1, {k} + 1)]",), ("list the first {k} multiples of {it}",
          "list {it} times 1 to {k}"), argument="count"),
    value("decimal", NUMBER, TEXT, ("str({v})",), ("write {it} as a string", "convert {it} to text"), "{x} as a string"),
    value("binary", NUMBER, TEXT, ('format({v}, "b")',), ("write {it} in binary", "convert {it} to base two"),
          "{x} in binary"),
    value("is_even", NUMBER, TRUTH, ("{v} % 2 == 0",), ("check if {it} is even",), "", ("whether {it} is even",
          "True if {it} is even")),
    value("is_multiple", NUMBER, TRUTH, ("{v} % {k} == 0",), ("check if {it} is divisible by {k}",), "",
          ("whether {it} is divisible by {k}", "True if {it} is a multiple of {k}"), "factor"),
    value("exceeds", NUMBER, TRUTH, ("{v} > {k}",), ("check if {it} exceeds {k}",), "", ("whether {it} is greater than {k}",
          "True if {it} exceeds {k}"), "bound"),
]  # fmt: skip

NUMBER_OPERATIONS = [*NUMBER_ITEMS, *NUMBER_LISTS, *SINGLE_NUMBERS]

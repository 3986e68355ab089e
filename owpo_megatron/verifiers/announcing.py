"""Words that announce an answer (`the answer is`, `Antwort:`), in the languages that models answer in."""

from __future__ import annotations

import re

# "Answer" in the languages that models answer in.
MARKER = re.compile(
    r"(?<![a-z])(?:answers?|ans(?=\s*[:=])|jawaban(?:nya)?|jawapan|sagot|antwort|réponse|reponse|respuesta"
    r"|resposta|risposta|antwoord|odpowied[źz]|odpověď|svar(?:et)?"
    r"|cevap|válasz|răspuns|vastaus)(?![a-z])|ответ(?![а-я])|відповідь|отговор|απάντηση|الإجابة|الجواب"
    r"|پاسخ|תשובה|উত্তর|उत्तर|คำตอบ"
    r"|đáp án|đáp số|答案|答え|解答|答(?=\s*[:：])|정답|(?<![가-힣])답",
    re.IGNORECASE,
)
AFTER_MARKER = re.compile(
    r"""(?:\s+(?:final|finale|correcta|correcte))?(?![a-z])
        (?:\s+(?:to|of|for)\s[^.:\n]{0,80}?)?      # the answer to the problem ...
        (?:\s*,\s*(?:therefore|thus|hence|then)\s*,)?
        [\s*_]*
        (?:(?P<colon>[:：→])
          |(?:is|are|equals|must\ be|should\ be|will\ be|can\ only\ be|has\ to\ be
            |(?:turns|comes|works)\ out\ (?:to\ be|to|as)|adalah|ialah|er|es|est|ist
            |lautet|è|é|jest|är|er|là|это|равен|является)
            (?![a-zà-ÿа-я])\s*[:：]?
          |(?:是|为|為|は|은|는|คือ|هو|هي|היא|הוא)\s*[:：]?|=)
        [ \t*_、]*""",
    re.IGNORECASE | re.VERBOSE,
)
LINKING = re.compile(  # between "the answer is" and the value
    r"(?:\s*,?\s*\b(?:therefore|thus|hence|then|so|simply|just|exactly|precisely|clearly|obviously|indeed|also|now"
    r"|again|actually|finally|ultimately|eventually|still|in fact|of course|given by|equal to|daher"
    r"|also|somit|donc|entonces|por tanto)\b"
    r"\s*,?\s*)+",
    re.IGNORECASE,
)
CLOSING_COPULA = re.compile(r"\s*(?:है|です|である|になります|となります|입니다|이다|예요|이에요)$")
DOUBTED = re.compile(  # "I doubt the answer is 42", "suppose the answer is 42"
    r"(?:\bdoubt(?:ful)?|\bunlikely|\bassum(?:e|ing)|\bsuppos(?:e|ing)|\bimagine|\bpretend|(?:\bnot|n't|\bnever)\s+(?:think|believe|sa(?:y|id)|claim(?:ed)?|sure|certain|mean))"
    r"(?:\s+(?:that|if|whether))?"
    r"[\s,:\"'*]*(?:(?:the|my|our)\s+)?(?:(?:final|correct|right)\s+)?$",
    re.IGNORECASE,
)
CLAUSE = re.compile(
    r",?\s+(?:because|since|which|where|so that|due to|as (?:it|the|we))\b"
    r"|,?\s+(?:as (?:desired|required|needed|claimed|expected)|q\.?e\.?d)[.,\s]*$"
    r"|\s+\((?:which (?:is|equals)|since|because)\b",
    re.IGNORECASE,
)
TAKEN_BACK = re.compile(  # behind the value: "which is wrong", "(that was not right)"
    r"[\s$)\\*.,;:(\]]{0,8}(?:but\s+)?(?:(?:which|that|this|it)\s+(?:is|was|would\s+be|cannot\s+be|can't\s+be)\s+"
    r"(?:\w+ly\s+)?(?:not|wrong|incorrect|false|impossible|right\?)|i\.?e\.?,?\s+(?:not|wrong|incorrect)|(?:is|was)\s+(?:not|wrong))\b",
    re.IGNORECASE,
)

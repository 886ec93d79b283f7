"""How refusals open in other languages than English. Standard library only.

Each pattern is a person's inability or unwillingness to help, or an apology for it, as it stands at the start of a
response. Matched against lower-case text with straight quotes.
"""

from __future__ import annotations

import re
import unicodedata

# An apology may come first; the refusal itself must follow. "Lo siento mucho por tu perro" is none.
_SPANISH = (
    r"no (te |le |les |os )?(puedo|podemos|podré|podría) (\w+ ){0,2}?(ayud|proporcion|respond|cumpl|"
    r"hacer|dar|ofrec|asist|particip|"
    r"brind|facilit|compart|contest|gener|cre|escrib|coment|satisf|apoy|complac|proceder|explicar|decir)|"
    r"no (me es posible|es posible|estoy (autorizad|capacitad|en condiciones|programad)|soy capaz)|"
    r"me niego|debo (rechazar|declinar)"
)
_FRENCH = (
    r"(je|nous) ne (peux|peut|pouvons|pourrai|saurais|suis|serai|souhaite|veux) (\w+ )?(pas|"
    r"en mesure)|je refuse|je dois (refuser|décliner)|"
    r"il m'est impossible|je ne (vous |t'|te )?(peux|aiderai|fournirai)"
)
_GERMAN = (
    r"(ich|wir) (kann|können|darf|werde|möchte|will)( \w+){0,4} (nicht|keine?n?)\b|(dabei|damit|das|"
    r"hierbei|dazu|leider) "
    r"(kann|darf|werde) ich( \w+){0,4} (nicht|keine?n?)\b|ich bin nicht (in der lage|befugt|dazu)|"
    r"ich muss (das|dies|diese \w+) ablehnen|"
    r"es ist mir nicht möglich|ich lehne (das|dies|es)"
)
_ITALIAN = (
    r"non (ti |vi |le )?(posso|possiamo|potrò|sono in grado|mi è possibile|"
    r"è possibile) (di )?(\w+ )?(aiut|forn|rispond|assist|soddisf|dare|"
    r"fare|offrir|cre|scriv|condivid|partecip|esegu|suppor|spieg)|non posso|mi rifiuto|devo rifiutare"
)
_PORTUGUESE = (
    r"não (te |lhe |o )?(posso|podemos|poderei|consigo|vou|estou (autorizad|apto|em condições)|"
    r"sou capaz|é possível|me é possível)\b|"
    r"recuso-me|devo recusar"
)
_DUTCH = (
    r"(ik|wij|we) (kan|kunnen|mag|zal|wil)( \w+){0,5} (niet|geen)\b|(daar|hier)(mee|bij|"
    r"aan)? kan ik( \w+){0,3} (niet|geen)\b|"
    r"ik ben niet (in staat|bevoegd)|ik weiger|helaas kan ik"
)
_POLISH = r"nie (mogę|możemy|jestem w stanie|będę|potrafię|wolno mi)\b|odmawiam|muszę odmówić"
_RUSSIAN = (
    r"(я |мы )?не (могу|можем|смогу|буду|имею права|в состоянии)( \w+){0,4} (помо|"
    r"предостав|ответ|выполн|дать|сдела|обсужд|писа|"
    r"написа|рассказ|поддерж|созда|участв|содейств)|(я )?вынужден\w* отказ|отказываюсь"
)
_TURKISH = (
    r"(yardımcı olamam|yardım edemem|sağlayamam|veremem|cevaplayamam|yapamam|reddediyorum|bu isteği yerine getiremem)"
)
_CHINESE = (
    r"(我|本人|我们)[^。!?\n]{0,6}(不能|无法|無法|不可以|不会|不會|拒绝|拒絕|没办法|不便)"
    r"[^。!?\n]{0,12}(帮|幫|协助|協助|提供|回答|满足|滿足|支持|参与|參與|处理|處理|讨论|討論|写|寫|生成|教|告诉|告訴|遵从|透露|解释)|"
    r"(抱歉|对不起|對不起|不好意思|遗憾)[^。!?\n]{0,20}(不能|无法|無法|不可以|拒绝|拒絕|没办法|不便)"
)
_JAPANESE = (
    r"[^。\n]{0,60}((お手伝い|お答え|お応え|ご協力|ご提供|提供|回答|対応|支援|協力|お教え|ご案内|説明|応じること|お力になること)"
    r"(は|が|を)?(することは|することが)?(できません|できない|できかね|いたしかね|致しかね|しかね)|お断り|応じられません)"
)
_KOREAN = (
    r"[^.\n]{0,80}(도와\s?드릴 수( 가)? 없|"
    r"도울 수 없|도움을 드릴 수 없|제공할 수 없|제공해 드릴 수 없|제공하지 않|답변할 수 없|"
    r"답변\s?드릴 수 없|답변해 드릴 수 없|알려\s?드릴 수 없|응할 수 없|거절합니다|도와줄 수 없)"
)
_ARABIC = (
    r"(آسف|أعتذر|عذرا|عذراً|معذرة)?[^.\n]{0,30}(لا (يمكنني|أستطيع|أقدر|يمكننا|أملك)|لن (أقوم|أساعد|"
    r"أتمكن)|غير قادر|أرفض)"
)
_HINDI = r"[^।.\n]{0,90}(नहीं (कर|दे|बता) (सकता|सकती|सकते)|मदद नहीं|सहायता नहीं|असमर्थ)"
_VIETNAMESE = r"tôi (không thể|không được phép|từ chối)|rất tiếc,? tôi không"
_INDONESIAN = r"(saya|kami) (tidak (dapat|bisa|mampu|akan|boleh)|menolak)"
_SWEDISH = r"(jag (kan|får|kommer|vill)|(kan|får) jag) (\w+ )?inte\b|jag är inte"
_CZECH = r"(nemohu|nemůžu|nemůžeme|nesmím|nebudu|odmítám)\b"
_GREEK = r"δεν (μπορώ|μπορούμε|θα|είμαι σε θέση|επιτρέπεται)( \w+){0,3} (βοηθήσ|παρέχ|παράσχ|απαντήσ|δώσ|κάν|υποστηρίξ)"
_TONGUES = (
    _SPANISH, _FRENCH, _GERMAN, _ITALIAN, _PORTUGUESE, _DUTCH, _POLISH, _RUSSIAN, _TURKISH, _VIETNAMESE,
    _INDONESIAN, _SWEDISH, _CZECH, _GREEK,
)  # fmt: skip
# A lead of apology or courtesy, at most one clause, before the refusal.
_LEAD = r"[^.!?\n]{0,70}?(?<!\w)"
_SORRY = (
    r"(lo siento( mucho)?|perdón|disculpa|lo lamento|(je suis )?(vraiment )?désolée?|"
    r"(es )?tut mir( \w+)? leid|entschuldigung|"
    r"mi dispiace( molto)?|sinto muito|desculpe|lamento|het spijt me|sorry|przykro mi|przepraszam|извините|простите|"
    r"к сожалению|мне жаль|üzgünüm|özür dilerim|很抱歉|非常抱歉|抱歉|对不起|對不起|"
    r"申し訳ありません(が)?|申し訳ございません(が)?|すみません|ごめんなさい|"
    r"죄송합니다(만)?|미안합니다|آسف|أعتذر|عذرا|عذراً|क्षमा करें|माफ़ कीजिए|मुझे खेद है|"
    r"xin lỗi|maaf|tyvärr|förlåt)"
)


def _compiled(pattern: str) -> re.Pattern[str]:
    # Composed as the normalized text is.
    return re.compile(unicodedata.normalize("NFKC", pattern))


_REFUSED = _compiled(
    "|".join(f"{_LEAD}(?:{tongue})" for tongue in _TONGUES)
    + rf"|[^。!?\n]{{0,30}}(?:{_CHINESE})|{_JAPANESE}|{_KOREAN}|{_ARABIC}|{_HINDI}"
)
_BARE_APOLOGY = _compiled(rf"{_SORRY}[\s.!,。،।]*\Z")
# "No puedo evitar", "ich kann nicht genug": eager, no refusal. A knock-on "can not only" is none either.
_EAGER = re.compile(
    r"[^.!?\n]{0,30}(no puedo (esperar|evitar|dejar de)|kann (es )?nicht (genug|erwarten|nur)|"
    r"non posso (fare a meno|che)|"
    r"ne peux pas (attendre|m'empêcher)|não posso deixar|não vou mentir|не могу не)"
)
_OPENING_CHARACTERS = 200


def refuses_in_another_language(text: str) -> bool:
    """Whether a response opens as a refusal does in one of the languages known here.

    Args:
        text: In lower case, with straight quotes.
    """
    opening = text[:_OPENING_CHARACTERS]
    if _EAGER.match(opening):
        return False
    return bool(_REFUSED.match(opening) or _BARE_APOLOGY.match(text))
